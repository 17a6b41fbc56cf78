"""The results of run.py as Markdown: mean and range over the seeds, counts with 95 % intervals and p-values.

python benchmarks/learning/table.py [saved/learning/results.jsonl] [--reference baseline] [--chart curves.png]
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for latentdiff where it is not installed

from scipy.stats import fisher_exact

from latentdiff.evaluation.scores import Rate
from latentdiff.figures.charts import EARLY_TO_LATE, rendered
from latentdiff.formats.files import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
# Rows are compared where these are equal.
SETTING = ("budget", "base", "overrides", "prompts")
HEAD = (
    *("variant", "seeds", "steps", "CPU s / step", "TFLOPs", "exact", "exact by seed", "p", "copies"),
    *("PSNR to the truth (dB)", "validation loss"),
)


def pooled(rows: Sequence[Row], key: str) -> Rate:
    """Counts over all seeds."""
    return Rate(sum(row[key] for row in rows), sum(row["prompts"] for row in rows))


def p_value(one: Rate, other: Rate) -> float:
    """Fisher's exact test, two-sided, of two rates being equal."""
    counts = [[rate.hits, rate.total - rate.hits] for rate in (one, other)]
    result: Any = fisher_exact(counts)
    return float(result.pvalue)


def spread(values: Sequence[float], form: str) -> str:
    """ "0.31 (0.28 .. 0.35)": mean and range."""
    mean, low, high = (format(value, form) for value in (fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} .. {high})"


def line(name: str, rows: Sequence[Row], reference: Sequence[Row] | None) -> tuple[str, ...]:
    """A variant's line. reference: the rows it is compared with."""
    exact = pooled(rows, "exact")
    seconds = [row["cpu_seconds_per_step"] for row in rows if row["cpu_seconds_per_step"] is not None]
    return (
        name,
        str(len(rows)),
        spread([row["steps"] for row in rows], ".0f")
        if len({row["steps"] for row in rows}) > 1
        else f"{rows[0]['steps']}",
        f"{fmean(seconds):.3f}" if seconds else "",
        f"{fmean(row['steps'] * row['flops_per_step'] for row in rows) / 1e12:.3g}",
        str(exact),
        spread([row["exact"] / row["prompts"] for row in rows], ".0%"),
        "" if reference is None else f"{p_value(exact, pooled(reference, 'exact')):.2g}",
        str(pooled(rows, "copies").hits),
        spread([row["psnr"] for row in rows], ".2f"),
        spread([row["validation_loss"] for row in rows], ".4f"),
    )


def tables(rows: Sequence[Row], reference: str) -> str:
    """A table for each budget and base config; in each, p-values against the variant `reference` there.

    With several autoencoders the reference is that of the first one.
    """
    parts = []
    for setting in dict.fromkeys(json.dumps([row[key] for key in SETTING]) for row in rows):
        here = [row for row in rows if json.dumps([row[key] for key in SETTING]) == setting]
        several = len({(row["vae"], row["vae_sha256"]) for row in here}) > 1
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in here:
            groups.setdefault((row["variant"], f"{row['vae']} {row['vae_sha256']}"), []).append(row)
        known = next((key for key in groups if key[0] == reference), None)
        lines = [HEAD, ("---",) * len(HEAD)]
        for key, members in groups.items():
            name = f"{key[0]}, {key[1]}" if several else key[0]
            lines.append(line(name, members, None if known is None or key == known else groups[known]))
        first = here[0]
        (kind, amount), *_ = first["budget"].items()
        title = " ".join(
            [f"{amount:g} {kind}", first["base"], *first["overrides"], f"{first['prompts']} prompts a seed"]
        )
        parts.append("\n".join([f"{title}\n", *(f"| {' | '.join(cells)} |" for cells in lines)]))
    return "\n\n".join(parts)


def curves(rows: Sequence[Row]) -> "Figure":
    """Share of exact images, PSNR and validation loss against the FLOPs of training, for variants with several budgets.

    A line is the mean over the seeds, with a point for each of them. Raises ValueError if no variant has two budgets.
    """
    from matplotlib.figure import Figure

    variants: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        tflops = float(f"{row['steps'] * row['flops_per_step'] / 1e12:.3g}")
        variants.setdefault(row["variant"], {}).setdefault(tflops, []).append(row)
    variants = {name: budgets for name, budgets in variants.items() if len(budgets) > 1}
    if not variants:
        raise ValueError("a chart needs a variant with at least two budgets")
    figure = Figure(figsize=(13.0, 3.8), dpi=110, layout="constrained")
    quantities: list[tuple[str, Callable[[Row], float]]] = [
        ("Held-out prompts exact", lambda row: row["exact"] / row["prompts"]),
        ("PSNR to the truth (dB)", lambda row: row["psnr"]),
        ("Validation loss", lambda row: row["validation_loss"]),
    ]
    for ax, (title, value) in zip(figure.subplots(1, 3), quantities, strict=True):
        for i, (name, budgets) in enumerate(variants.items()):
            colour, points = EARLY_TO_LATE[i % len(EARLY_TO_LATE)], sorted(budgets.items())
            ax.plot([x for x, _ in points], [fmean(map(value, own)) for _, own in points], color=colour, label=name)
            seeds = [(x, value(row)) for x, own in points for row in own]
            ax.scatter(*zip(*seeds, strict=True), s=14, color=colour)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("TFLOPs")
        ax.set_xscale("log")
        budgets = sorted({tflops for own in variants.values() for tflops in own})
        ax.set_xticks(budgets, [f"{tflops:g}" for tflops in budgets], minor=False)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("saved/learning/results.jsonl"))
    parser.add_argument("--reference", default="baseline", help="the variant that p-values are against")
    parser.add_argument("--chart", type=Path, help="a PNG of the variants that have several budgets")
    arguments = parser.parse_args()
    rows = [json.loads(text) for text in arguments.results.read_text(encoding="utf-8").splitlines()]
    print(tables(rows, arguments.reference))
    if arguments.chart is not None:
        write_png(rendered(curves(rows)), arguments.chart)


if __name__ == "__main__":
    main()

"""The page of a run: RUN/index.html, one file that needs no other one. No caption, prompt or name is to be trusted.

It is put together from the files of a run alone, so it can be written at any time and for runs of earlier versions.
"""

import base64
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal

from PIL import Image

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_run_config
from latentdiff.evaluation.autoencoder import IMAGE_FILE as VAE_IMAGE
from latentdiff.evaluation.autoencoder import REPORT_FILE as VAE_REPORT
from latentdiff.explain import differing
from latentdiff.figures.charts import BLUE, GREEN, GREY, ORANGE, Series, by_bin, evenly_chosen, running_mean
from latentdiff.figures.grids import GAP
from latentdiff.figures.svg import Line, line_chart
from latentdiff.formats.files import PNG_KEY, read_json, write_text
from latentdiff.formats.locks import holding_file
from latentdiff.printable import cut, images_of, printable
from latentdiff.training.contact_sheet import HELD_OUT, IMAGE_FILE, NEW, ContactSheet
from latentdiff.training.logging import PUBLISHED_STEP
from latentdiff.training.report import objective_of, read_metrics
from latentdiff.training.run_folder import LOCK_FILE, RECORD_FILE, has_model, is_finished
from latentdiff.training.verdict import Verdict, verdict

PAGE_FILE = "index.html"
State = Literal["training", "stopped", "finished"]
Config = VAETrainingConfig | UNetTrainingConfig

# The whole page stays below 8 MB: base64 takes 4 characters for 3 bytes.
MAX_GRIDS = 24
GRIDS_BYTES = 4_600_000  # of the image files of all sample grids
IMAGE_BYTES = 170_000  # of a grid that is made smaller: 24 of them are within GRIDS_BYTES
FIGURE_BYTES = 500_000  # of any other image
SMALLER_SIDES = (1200, 900, 640, 450, 320, 220)  # pixels, tried in turn
HEAT_COLUMNS = 11  # steps of the heat map
PIXELATED = 64  # pixels; smaller images are shown with their pixels as squares
RECENT = 20  # lines of the log that the speed is a mean of
TEXT = 300  # characters of a caption or value


# ----------------------------------------------------------------------------------------------------------------------
# The page


@dataclass(frozen=True)
class _Run:
    """What a run's folder says. config, sheet: None without the file."""

    folder: Path
    state: State
    config: Config | None
    metrics: dict[str, Series]
    verdict: Verdict
    sheet: ContactSheet | None

    @property
    def step(self) -> int:
        """The last one with a number."""
        return max((step for series in self.metrics.values() for step in series), default=0)

    @property
    def is_stage_1(self) -> bool:
        if self.config is None:
            return "validation/mse" in self.metrics
        return isinstance(self.config, VAETrainingConfig)


def write_page(run: Path, state: State | None = None) -> Verdict:
    """Write RUN/index.html from the files of a run of either stage; returns the verdict on its numbers.

    state: None: as the folder tells. Raises ValueError if metrics.jsonl is missing or broken, or the config or another
    file cannot be read.
    """
    read = _read(run, read_metrics(run / "metrics.jsonl"), state)
    write_text(_page(read), run / PAGE_FILE)
    return read.verdict


@dataclass(frozen=True)
class Addition:
    """What a served page has besides: a panel, its style and its script, and what its policy allows for it."""

    panel: str
    style: str
    script: str
    policy: str


def served_page(run: Path, addition: Addition | None) -> str:
    """The page as `write_page` writes it, with an addition below the verdict; also of a folder without metrics.jsonl.

    Raises ValueError as `write_page`.
    """
    return _page(_read_any(run), addition)


@dataclass(frozen=True)
class Standing:
    """What a list of runs says of one. about: what it trains, on what."""

    about: str
    state: State
    step: int
    verdict: str


def standing(run: Path) -> Standing:
    """How a run stands; ValueError as `served_page`."""
    read = _read_any(run)
    return Standing(_about(read), read.state, read.step, read.verdict.title if read.metrics else "")


def _read_any(run: Path) -> _Run:
    path = run / "metrics.jsonl"
    if path.is_file():
        return _read(run, read_metrics(path))
    return _read(run, {}, "finished" if has_model(run) else None)  # a published model alone


def _read(run: Path, metrics: dict[str, Series], state: State | None = None) -> _Run:
    config = load_run_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    said = _said(metrics, config)
    return _Run(run, state or _state(run, metrics), config, metrics, said, ContactSheet.load(run))


def _said(metrics: Mapping[str, Series], config: Config | None) -> Verdict:
    if config is None:
        return verdict(metrics)
    complete_at = config.loss.complete_at if isinstance(config, VAETrainingConfig) else 0
    return verdict(metrics, publishes_best=config.publishes_best, complete_at=complete_at)


def _state(run: Path, metrics: Mapping[str, Series]) -> State:
    if is_finished(run) or (PUBLISHED_STEP in metrics and not (run / RECORD_FILE).is_file()):
        return "finished"
    if (run / LOCK_FILE).is_file():
        with holding_file(run / LOCK_FILE) as free:
            return "stopped" if free else "training"
    return "stopped"


def _page(run: _Run, addition: Addition | None = None) -> str:
    assets = resources.files("latentdiff").joinpath("assets")
    script = assets.joinpath("run_page.js").read_text("utf-8")
    if addition is not None:
        script += addition.script
    columns = (_samples_panel(run), f"{''.join(_charts(run))}{_heat_panel(run.metrics)}")
    parts = [
        _header(run),
        _cards(run) if run.metrics or addition is None else "",
        _verdict_panel(run.verdict) if run.metrics or addition is None else "",
        addition.panel if addition is not None else "",
        '<div class="panels">',
        *(f'<div class="column">{column}</div>' for column in columns if column),
        "</div>",
        _images_panel(run),
        _autoencoder_panel(run),
        _commands_panel(run),
        _config_panel(run.config),
    ]
    return Template(assets.joinpath("run_page.html").read_text("utf-8")).substitute(
        title=_text(_name(run.folder)),
        body="\n".join(part for part in parts if part),
        script=script,
        script_hash=script_hash(script),
        style=addition.style if addition is not None else "",
        policy=addition.policy if addition is not None else "",
    )


def script_hash(script: str) -> str:
    """As a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}"


def _text(value: object, at_most: int = TEXT) -> str:
    """A text of whatever origin, for an element or an attribute in double quotes."""
    return escape(cut(printable(str(value)).replace("\n", " "), at_most))


def _name(folder: Path) -> str:
    return folder.resolve().name


def _panel(title: str, remark: str, content: str, kind: str = "panel") -> str:
    aside = f' <span class="dim">{remark}</span>' if remark else ""
    return f'<section class="{kind}"><h2>{title}{aside}</h2>{content}</section>'


# ----------------------------------------------------------------------------------------------------------------------
# Where the run stands


def _about(run: _Run) -> str:
    about = []
    if isinstance(run.config, UNetTrainingConfig):
        space = "on the images themselves" if run.config.is_pixel_space else f"on the latents of {run.config.vae}"
        about.append(f"stage 2, the UNet {space}")
    elif run.config is not None:
        about.append("stage 1, the autoencoder")
    if run.config is not None:
        height, width = run.config.data.shape
        about.append(f"{width} px" if width == height else f"{width} x {height} px")
        about.append(f"images of {run.config.data.source}")
    if run.sheet is not None:
        about.append(f"{images_of(run.sheet.training, 'training')}, {run.sheet.held_out:,} held out")
    return " · ".join(about)


def _header(run: _Run) -> str:
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return (
        f"<header><div><h1>{_text(_name(run.folder))}</h1><small>{_text(_about(run))}</small></div>"
        f'<div class="dim"><b>{run.state}</b>, written {written}</div></header>'
    )


def _cards(run: _Run) -> str:
    total = run.config.train.steps if run.config is not None else run.step
    bar = f'<progress max="{total}" value="{min(run.step, total)}"></progress>'
    cards = [_card("step", f"{run.step:,} / {total:,}", _when(run, total))]
    losses = run.metrics.get("loss", {})
    if losses:
        every = f"mean of {run.config.logging.every} steps" if run.config is not None else ""
        cards.append(_card("training loss", f"{losses[max(losses)]:.4g}", every))
    said = run.verdict
    if said.loss is not None and said.best_loss is not None and said.best_step is not None:
        measure = "MSE of held-out images" if run.is_stage_1 else "validation loss"
        cards.append(_card(measure, f"{said.loss:.4g}", f"best {said.best_loss:.4g} at step {said.best_step:,}"))
    psnr = run.metrics.get("validation/psnr", {})
    if psnr:
        cards.append(_card("PSNR", f"{psnr[max(psnr)]:.1f} dB", "of held-out images"))
    if speed := _speed(run.metrics):
        mfu = run.metrics.get("mfu", {})
        remark = f"{mfu[max(mfu)]:.0%} of the device's peak" if mfu else "of the steps alone"
        cards.append(_card("speed", f"{speed:.3g} images/s", remark))
    if memory := run.metrics.get("peak_memory", {}):
        cards.append(_card("memory", f"{memory[max(memory)] / 1e9:.3g} GB", "the most so far"))
    return f'{bar}<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, remark: str) -> str:
    return f'<div class="card"><small>{name}</small><b>{value}</b><small>{remark}</small></div>'


def _speed(metrics: Mapping[str, Series]) -> float | None:
    """Images per second over the last lines of the log, which are of equally many images."""
    recent = [speed for speed in metrics.get("images_per_second", {}).values() if speed > 0][-RECENT:]
    return len(recent) / sum(1 / speed for speed in recent) if recent else None


def _when(run: _Run, total: int) -> str:
    if run.state == "training" and run.config is not None and (pace := _seconds_of_step(run.metrics, run.config)):
        seconds = (total - run.step) * pace
        return f"{timedelta(seconds=round(seconds))} left" if seconds < 1e9 else ""
    return run.state


def _seconds_of_step(metrics: Mapping[str, Series], config: VAETrainingConfig | UNetTrainingConfig) -> float | None:
    """Seconds for a step over the last lines of the log, with validation and all else between the steps.

    Logs of older versions have no `seconds`; there the speed had all of it.
    """
    lines = list(metrics.get("seconds", {}).items())[-RECENT:]
    if len(lines) > 1:
        return sum(seconds for _, seconds in lines[1:]) / (lines[-1][0] - lines[0][0])
    speed = _speed(metrics)
    return None if speed is None else config.train.batch_size / speed


def _verdict_panel(said: Verdict) -> str:
    alarming = " alarming" if said.is_alarming else ""
    rest = _text(" ".join([said.sentence, *said.notes]), at_most=2000)
    return f'<section class="panel verdict{alarming}" id="verdict"><b>{_text(said.title)}.</b> {rest}</section>'


# ----------------------------------------------------------------------------------------------------------------------
# Images


@lru_cache(maxsize=2 * MAX_GRIDS)
def _shrunk(path: Path, _changed: int, at_most: int) -> bytes:
    """An image as a JPEG file of at most so many bytes, if it can be. _changed: when the file was, for the cache."""
    with Image.open(path) as image:
        smaller = image.convert("RGB")
    content = b""
    for side in SMALLER_SIDES:
        if content and side >= max(smaller.size):
            continue
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=85, subsampling=0)
        content = buffer.getvalue()
        if len(content) <= at_most:
            break
    return content


def _data_uri(path: Path, at_most: int, shrunk_to: int) -> str:
    """An image file as it is; if it has more than `at_most` bytes, a JPEG of about `shrunk_to`."""
    known = path.stat()
    if known.st_size <= at_most:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f"data:image/jpeg;base64,{base64.b64encode(_shrunk(path, known.st_mtime_ns, shrunk_to)).decode()}"


@dataclass(frozen=True)
class _Cell:
    """A part of a grid that is shown as a picture of its own; x, y, width, height: pixels of the grid."""

    x: int
    y: int
    width: int
    height: int
    caption: str = ""
    tag: str = ""


@dataclass(frozen=True)
class _Layout:
    """How a grid of some size is cut into pictures."""

    width: int
    height: int
    cells: tuple[_Cell, ...]

    def html(self, name: str, uri: str | None, attributes: str = "") -> str:
        """The pictures with their captions; the grid is there once. Without one, uri None, they are hidden."""
        kind = " whole" if len(self.cells) == 1 else " pixels" if self.cells[0].width <= PIXELATED else ""
        size = f'width="{self.width}" height="{self.height}"'
        source = "" if uri is None else f' href="{uri}"'
        figures = [f'<svg class="store"><defs><image id="{name}" {size}{source}/></defs></svg>']
        for cell in self.cells:
            box = f"{cell.x} {cell.y} {cell.width} {cell.height}"
            label = f' role="img" aria-label="{_text(cell.caption)}"' if cell.caption else ""
            tag = f' <span class="tag">{_text(cell.tag)}</span>' if cell.tag else ""
            words = f"<figcaption>{_text(cell.caption)}{tag}</figcaption>" if cell.caption else ""
            figures.append(f'<figure><svg viewBox="{box}"{label}><use href="#{name}"/></svg>{words}</figure>')
        hidden = " hidden" if uri is None else ""
        return f'<div class="cells{kind}"{attributes}{hidden}>{"".join(figures)}</div>'


def _tiles(size: tuple[int, int], columns: int, rows: int) -> Iterator[_Cell]:
    """The images of a grid of `size` pixels (width, height), row by row."""
    width, height = (size[0] + GAP) // columns - GAP, (size[1] + GAP) // rows - GAP
    for row in range(rows):
        for column in range(columns):
            yield _Cell(column * (width + GAP), row * (height + GAP), width, height)


def _grid_layout(path: Path, run: _Run) -> _Layout:
    """Of a sample grid: the images with their prompts; in stage 1 each original above its reconstruction."""
    with Image.open(path) as image:
        size, about = image.size, image.info.get(PNG_KEY)
    whole = _Layout(*size, (_Cell(0, 0, *size),))
    if run.config is None:
        return whole
    height, width = run.config.data.shape
    columns, rows = (size[0] + GAP) // (width + GAP), (size[1] + GAP) // (height + GAP)
    if (columns * (width + GAP), rows * (height + GAP)) != (size[0] + GAP, size[1] + GAP):
        return whole
    if run.is_stage_1:
        return _Layout(*size, tuple(_tiles(size, columns, 1)))
    tiles = list(_tiles(size, columns, rows))
    prompts = _prompts(about, run.config)
    if not any(prompts):  # not known, or a model without captions
        return _Layout(*size, tuple(tiles))
    tags = run.sheet.prompts if run.sheet is not None else {}
    shown = {HELD_OUT: "held out", NEW: "not in training"}
    return _Layout(
        *size,
        tuple(
            replace(tile, caption=prompt or "(no prompt)", tag=shown.get(tags.get(prompt, ""), ""))
            for tile, prompt in zip(tiles, prompts, strict=False)
        ),
    )


def _prompts(about: str | None, config: Config) -> Sequence[str]:
    """The prompts of a sample grid: as its file says; in files without them the config's, if all grids have these."""
    if about is not None:
        prompts = json.loads(about).get("prompts", [])
        return prompts if isinstance(prompts, list) and all(isinstance(one, str) for one in prompts) else []
    assert isinstance(config, UNetTrainingConfig)
    all_of_them = config.validation.num_samples in (None, len(config.validation.prompts))
    return config.validation.prompts if all_of_them else []


def _samples_panel(run: _Run) -> str:
    every = {_step_of(path): path for path in sorted((run.folder / "samples").glob("step_*.png"))}
    paths = [path for step, path in every.items() if step <= run.step]  # later ones are of an abandoned continuation
    if not paths:
        return ""
    chosen = evenly_chosen(paths, MAX_GRIDS)
    at_most = max(IMAGE_BYTES, GRIDS_BYTES // (len(chosen) + 1))  # the newest one is there twice
    layouts: dict[_Layout, int] = {}
    film, uri, number = [], "", 0
    for path in chosen:
        number = layouts.setdefault(_grid_layout(path, run), len(layouts))
        uri = _data_uri(path, at_most, IMAGE_BYTES)
        step = f"step {_step_of(path):,}"
        film.append(
            f'<button type="button" title="{step}" data-layout="{number}" aria-pressed="false">'
            f'<img src="{uri}" alt="{step}"></button>'
        )
    grids = [  # number and uri are now the newest one's
        layout.html(f"grid-{other}", uri if other == number else None, f' data-layout="{other}"')
        for layout, other in layouts.items()
    ]
    title = "Reconstructions over time" if run.is_stage_1 else "Samples over time"
    remark = "each original above its reconstruction, " if run.is_stage_1 else ""
    remark += f'<span id="at">step {_step_of(chosen[-1]):,}</span>'
    hidden = " hidden" if len(chosen) == 1 else ""
    slider = (
        f'<input type="range" id="slider" min="0" max="{len(chosen) - 1}" value="{len(chosen) - 1}" '
        f'aria-label="sample grid"{hidden}>'
    )
    return _panel(title, remark, f'{"".join(grids)}{slider}<div class="film">{"".join(film)}</div>')


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _images_panel(run: _Run) -> str:
    path = run.folder / IMAGE_FILE
    if run.sheet is None or not run.sheet.captions or not path.is_file():
        return ""
    with Image.open(path) as image:
        size = image.size
    rows = math.ceil(len(run.sheet.captions) / run.sheet.columns)
    cells = [
        replace(cell, caption=caption or "(no caption)")
        for cell, caption in zip(_tiles(size, run.sheet.columns, rows), run.sheet.captions, strict=False)
    ]
    layout = _Layout(*size, tuple(cells))
    remark = f"{len(cells)} of the {images_of(run.sheet.training, 'training')}"
    uri = _data_uri(path, FIGURE_BYTES, FIGURE_BYTES)
    return _panel("The images as the model sees them", remark, layout.html("images", uri))


def _autoencoder_panel(run: _Run) -> str:
    """The report at the end of stage 1, of which stage 2 has a copy."""
    if not (run.folder / VAE_REPORT).is_file():
        return ""
    report = read_json(run.folder / VAE_REPORT)
    checks = [check for check in report.get("checks", []) if isinstance(check, dict)]
    failed = [_text(check.get("reason")) for check in checks if check.get("passed") is not True]
    passed = [_text(check.get("reason")) for check in checks if check.get("passed") is True]
    fit = "Fit for stage 2" if report.get("fit") is True else "Unfit for stage 2"
    lists = f'<ul class="failed">{_items(failed)}</ul>' if failed else ""
    content = f'<div>{lists}<ul class="passed">{_items(passed)}</ul></div>'
    image = run.folder / VAE_IMAGE
    if image.is_file():
        content += (
            f'<img class="report" src="{_data_uri(image, FIGURE_BYTES, FIGURE_BYTES)}" alt="best and worst images">'
        )
    remark = f"measured on {_text(report.get('data'))}"
    return _panel(f"The autoencoder: {fit}", remark, f'<div class="panels">{content}</div>')


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{line}</li>" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Charts


def _charts(run: _Run) -> Iterator[str]:
    metrics = run.metrics
    training = Line("training, running mean", running_mean(metrics.get("loss", {})), BLUE)
    marks = _marks(run)
    if run.is_stage_1:
        yield _chart("Training loss", [training], {})
        held_out = "MSE of held-out images"
        yield _chart(held_out, [Line(held_out, metrics.get("validation/mse", {}), ORANGE, marked=True)], marks)
        psnr = [Line("PSNR, dB", metrics.get("validation/psnr", {}), ORANGE, marked=True)]
        yield _chart("PSNR of held-out images", psnr, marks, log_allowed=False)
        return
    losses, gap = metrics.get("validation/loss", {}), metrics.get("validation/gap", {})
    same_noise = {step: losses[step] - gap[step] for step in losses if step in gap}
    validation = [
        Line("validation", losses, ORANGE, marked=True),
        Line("as many training images, same noise", same_noise, GREEN, marked=True),
        Line("constant prediction", metrics.get("validation/baseline", {}), GREY, dashed=True),
    ]
    objective = objective_of(run.folder)
    if objective:  # another measure than that of validation
        yield _chart("Validation loss", validation, marks)
        yield _chart(f"Training loss ({objective})", [training], {})
    else:
        yield _chart("Loss", [training, *validation], marks)


def _marks(run: _Run) -> dict[str, int]:
    published = run.metrics.get(PUBLISHED_STEP)
    if published:
        step = int(published[max(published)])
        return {f"published: step {step:,}": step}
    best = run.verdict.best_step
    return {} if best is None else {f"best validation: step {best:,}": best}


def _chart(title: str, lines: Sequence[Line], marks: Mapping[str, int], log_allowed: bool = True) -> str:
    lines = [line for line in lines if line.series]
    if not lines:
        return ""
    legend = "".join(
        f'<span><i class="{"dashed" if line.dashed else "line"}" style="color:{line.colour}"></i>{_text(line.name)}: '
        f"{line.series[max(line.series)]:.4g}</span>"
        for line in lines
    )
    legend += "".join(f'<span><i class="dashed" style="color:{GREY}"></i>{_text(mark)}</span>' for mark in marks)
    chart = line_chart(title, lines, marks, log_allowed)
    return _panel(_text(title), "over the optimiser steps", f'{chart}<div class="legend">{legend}</div>')


def _heat_panel(metrics: Mapping[str, Series]) -> str:
    """Validation loss over baseline by noise level and step."""
    losses, baselines = by_bin(metrics, "validation/loss"), by_bin(metrics, "validation/baseline")
    steps = evenly_chosen([step for step in losses if step in baselines], HEAT_COLUMNS)
    if not steps:
        return ""
    levels = len(losses[steps[-1]])
    head = "".join(f"<th>{step:,}</th>" for step in steps)
    rows = []
    for level in range(levels):
        where = " clean" if level == 0 else " noise" if level == levels - 1 else ""
        cells = "".join(_heat_cell(losses[step], baselines[step], level) for step in steps)
        rows.append(f"<tr><th>{level + 1}{where}</th>{cells}</tr>")
    table = (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<small>Validation loss divided by that of a constant prediction, by noise level (down) and step (across). "
        "1: nothing learned there; darker is better; orange is worse than a constant.</small>"
    )
    return _panel("What has been learned at which noise level", "", table)


def _heat_cell(losses: Sequence[float], baselines: Sequence[float], level: int) -> str:
    ratio = (
        losses[level] / baselines[level] if level < min(len(losses), len(baselines)) and baselines[level] else math.nan
    )
    if not math.isfinite(ratio):
        return "<td></td>"
    background, ink = heat_colours(ratio)
    return f'<td style="background:{background};color:{ink}">{ratio:.2f}</td>'


# From nothing left to learn to nothing learned: one hue, so that its lightness alone tells, then the opposite one.
_SCALE = (
    (0.0, (8, 48, 107)),
    (0.5, (107, 174, 214)),
    (1.0, (247, 251, 255)),
    (1.02, (255, 237, 220)),
    (1.5, (230, 130, 50)),
)


def heat_colours(ratio: float) -> tuple[str, str]:
    """Background and text colour of a ratio of at least 0; above 1 it is orange."""
    (below, first), (above, second) = next(
        (pair for pair in zip(_SCALE, _SCALE[1:], strict=False) if ratio <= pair[1][0]), _SCALE[-2:]
    )
    part = min(1.0, max(0.0, (ratio - below) / (above - below)))
    colour = [round(a + part * (b - a)) for a, b in zip(first, second, strict=True)]
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    # Where black and white have the same contrast with the background (WCAG 2), its luminance is 0.18.
    ink = "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#fff"
    return "#{:02x}{:02x}{:02x}".format(*colour), ink


# ----------------------------------------------------------------------------------------------------------------------
# What was set, and what to type


def _commands_panel(run: _Run) -> str:
    if run.config is None:
        return ""
    if run.state == "finished":
        command = next_command(run.folder, run.config)
        return "" if command is None else _panel("Next", "", f"<pre>{_text(command, 2000)}</pre>")
    return _panel("To resume", "", f"<pre>{_text(resume_command(run.folder, run.config), 2000)}</pre>")


def resume_command(run: Path, config: Config) -> str:
    """The command that continues a run from its newest checkpoint."""
    command = "train-vae" if isinstance(config, VAETrainingConfig) else "train-unet"
    return shlex.join(["latentdiff", command, str(run / "config.yaml")])


def next_command(run: Path, config: Config) -> str | None:
    """What to do with a finished run; None for an autoencoder that its report calls unfit for stage 2."""
    if isinstance(config, UNetTrainingConfig):
        return shlex.join(["latentdiff", "generate", str(run), config.validation.prompts[0]])
    report = run / VAE_REPORT
    if report.is_file() and read_json(report).get("fit") is not True:
        return None
    return f"latentdiff train-unet CONFIG {shlex.quote(f'vae={run}')}"


def _config_panel(config: Config | None) -> str:
    if config is None:
        return ""
    rows = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in differing(config).items()
    )
    remark = "keys that differ from the defaults; config.yaml has all"
    return _panel("Config", remark, f'<dl class="config">{rows}</dl>')

"""Size and structure of the code: lines, functions, and imports between folders.

python benchmarks/structure.py [ROOT]
"""

import argparse
import ast
import statistics
from collections.abc import Iterator
from pathlib import Path


def modules(root: Path) -> dict[str, Path]:
    """The package's modules and the training scripts, by dotted name."""
    files = [*root.glob("train_*.py"), *(root / "latentdiff").rglob("*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def folder_of(name: str, known: dict[str, Path]) -> str:
    """The folder of a module: latentdiff.diffusion.schedule -> diffusion; files at the top are one folder, too."""
    parts = name.split(".")
    if len(parts) == 1:
        return "scripts" if name.startswith("train_") else "top"
    return parts[1] if len(parts) > 2 or known[name].name == "__init__.py" else "top"


def imports(name: str, tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The project's modules that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="checkout to count")
    root = parser.parse_args().root
    known = modules(root)
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in known.items()}
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in known.values())
    functions = {
        f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    longest = sorted(functions.items(), key=lambda item: -item[1])[:3]
    # The package's own __init__ names what it offers and imports it on first use: not an arrow.
    edges = {(a, b) for a, tree in trees.items() for b in imports(a, tree, known) if a != b and a != "latentdiff"}
    crossing = {(a, b) for a, b in edges if folder_of(a, known) != folder_of(b, known)}
    arrows = {(folder_of(a, known), folder_of(b, known)) for a, b in crossing}
    both_ways = sorted({tuple(sorted(pair)) for pair in arrows if pair[::-1] in arrows})
    top = [name for name in known if folder_of(name, known) == "top" and known[name].parent.name == "latentdiff"]
    print(f"lines of package and scripts      {lines:,} in {len(known)} files, {len(top)} at the top of the package")
    print(f"functions: median, longest        {statistics.median(functions.values()):g}, {longest}")
    print(f"imports between modules           {len(edges)}, of them between folders {len(crossing)}")
    print(f"arrows between folders            {len(arrows)}, of them both ways {len(both_ways)} {both_ways}")


if __name__ == "__main__":
    main()

"""`latentdiff configs`: list the recipes, or copy one."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.recipes import recipes


def configs(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Print its files.", show_default=False)] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy its files into this folder, which may not have them yet.")
    ] = None,
) -> None:
    """List the recipes that come with latentdiff, print one, or copy it with --write."""
    known = {one.name: one for one in recipes()}
    if recipe is None:
        if write is not None:
            raise ValueError("--write is given, but no recipe; name one of those that `latentdiff configs` lists")
        width = max(map(len, known))
        for one in known.values():
            print(f"{one.name:{width}}  {one.title}")
        return
    chosen = known.get(recipe.strip("/").removeprefix("configs/"))
    if chosen is None:
        raise ValueError(f"there is no recipe {recipe!r}, must be one of {', '.join(known)}")
    if write is None:
        for file in chosen.files:
            print(f"# ---- {recipe}/{file.name}\n{file.read_text(encoding='utf-8')}")
        return
    if there := [write / file.name for file in chosen.files if (write / file.name).exists()]:
        raise ValueError(f"{', '.join(map(str, there))} exist already and are not replaced; choose another folder")
    write.mkdir(parents=True, exist_ok=True)
    for file in chosen.files:
        shutil.copyfile(file, write / file.name)
        print(write / file.name)

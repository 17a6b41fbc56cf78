"""`latentdiff inspect`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import NoProgress, check_writable


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="What data.source may be; with --config, its own if left out."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Config values, such as data.holdout=16."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Training size in pixels (default: that of the config, or 512).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Training config of either stage that the images are for.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report with images as one HTML file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a few images as the model sees them to this PNG.")] = None,
    write_metadata: Annotated[
        bool, typer.Option("--write-metadata", help="Write the captions found in a folder into its metadata.jsonl.")
    ] = False,
    no_progress: NoProgress = False,
) -> None:
    """Report what there is to know about images before training on them; status 1 if training would refuse them."""
    words = list(overrides or [])
    if source is not None and re.match(r"\w+\.[\w.]+=", source):  # there is none, these are overrides
        words, source = [source, *words], None
    if html is not None:
        check_writable("--html", html)
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise ValueError(f"--sheet {sheet} must end in .png")
        check_writable("--sheet", sheet)
    from latentdiff.data import metadata
    from latentdiff.evaluation import inspection
    from latentdiff.evaluation.inspection_page import as_html, as_text
    from latentdiff.formats.files import write_png, write_text

    settings = inspection.read_settings(source, size, config, words)
    if write_metadata:
        metadata.refuse_metadata(settings.data.source)
    found = inspection.inspect(settings, progress=not no_progress)
    sections = inspection.sections(found)
    print(as_text(sections))
    written = []
    if html is not None:
        write_text(as_html(found, sections), html)
        written.append(html)
    if sheet is not None and found.rows:
        write_png(inspection.contact_sheet(found), sheet)
        written.append(sheet)
    if write_metadata:
        written += metadata.write_metadata(settings.data)
    if written:
        print("", *written, sep="\n")
    if found.problems:
        raise typer.Exit(1)

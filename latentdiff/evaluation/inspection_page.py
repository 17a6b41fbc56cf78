"""The report of `latentdiff inspect` as text and as one HTML file. File names and captions are not to be trusted."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from string import Template

from PIL import Image

from latentdiff.evaluation.inspection import SHEET_SIDE, Finding, Histogram, Inspection, Row, Section, caption_of
from latentdiff.images import encode
from latentdiff.printable import cut, printable

TEXT_NAMES, PAGE_NAMES = 5, 200  # shown of a finding
TEXT_FINDINGS = 12  # shown of a section
BAR = 30  # characters of the longest one
GROUPS, GROUP_IMAGES, GROUP_SIDE = 12, 8, 96  # groups of near-duplicates shown, images of each, pixels
PAGE_CAPTION = 300  # characters of a caption under an image


def as_text(sections: Sequence[Section]) -> str:
    """The report for a terminal."""
    return "\n\n".join("\n".join(_section_lines(section)) for section in sections)


def _section_lines(section: Section) -> Iterator[str]:
    yield section.title
    for finding in section.findings[:TEXT_FINDINGS]:
        yield f"  {_line(finding.text)}"
        for name in finding.names[:TEXT_NAMES]:
            yield f"      {_line(name)}"
        if len(finding.names) > TEXT_NAMES:
            yield f"      ... and {len(finding.names) - TEXT_NAMES:,} more"
    if len(section.findings) > TEXT_FINDINGS:
        yield f"  ... and {len(section.findings) - TEXT_FINDINGS:,} more"
    for histogram in section.histograms:
        yield f"  {histogram.title}"
        yield from _bar_lines(histogram)


def _bar_lines(histogram: Histogram) -> Iterator[str]:
    most = max(count for _, count in histogram.shown)
    label_width = max(len(label) for label, _ in histogram.shown)
    count_width = max(len(f"{count:,}") for _, count in histogram.shown)
    for label, count in histogram.shown:
        bar = "#" * -(-count * BAR // most)  # of at least one character, unless there are none
        yield f"    {label:>{label_width}}  {count:>{count_width},}  {bar}".rstrip()


def _line(text: str) -> str:
    """A text from files as one line that a terminal can be given."""
    return cut(printable(text).replace("\n", " "), at_most=600)


# ----------------------------------------------------------------------------------------------------------------------
# HTML


def as_html(found: Inspection, sections: Sequence[Section]) -> str:
    """The report as a page that needs no other file: images are in it, and nothing runs."""
    template = Template(resources.files("latentdiff").joinpath("assets", "inspection.html").read_text("utf-8"))
    parts = [part for section in sections for part in _section_html(found, section)]
    if sheet := found.sheet():
        parts.append(f"<h2>As the model sees them, {found.settings.data.size} px</h2>")
        figures = "".join(_figure(found.picture(row, SHEET_SIDE), row, caption_of(row)) for row in sheet)
        parts.append(f'<div class="sheet">{figures}</div>')
    return template.substitute(title=escape(_line(found.settings.data.source)), body="\n".join(parts))


def _section_html(found: Inspection, section: Section) -> Iterator[str]:
    bad = ' class="bad"' if section.title.startswith("Problems:") else ""
    yield f"<h2{bad}>{escape(section.title)}</h2>"
    yield f"<ul>{''.join(map(_item, section.findings))}</ul>"
    if section.histograms:
        yield f'<div class="charts">{"".join(map(_chart, section.histograms))}</div>'
    for group in section.groups[:GROUPS]:
        figures = [_figure(found.picture(row, GROUP_SIDE), row, "") for row in group[:GROUP_IMAGES]]
        more = f"<p>... and {len(group) - GROUP_IMAGES:,} more</p>" if len(group) > GROUP_IMAGES else ""
        yield f'<div class="group">{"".join(figures)}{more}</div>'
    if len(section.groups) > GROUPS:
        yield f"<p>... and {len(section.groups) - GROUPS:,} more groups</p>"


def _item(finding: Finding) -> str:
    if not finding.names:
        return f"<li>{escape(_line(finding.text))}</li>"
    more = len(finding.names) - PAGE_NAMES
    names = "<br>".join(escape(_line(name)) for name in finding.names[:PAGE_NAMES])
    names += f"<br>... and {more:,} more" if more > 0 else ""
    return f"<li>{escape(_line(finding.text))}<details><summary>names</summary>{names}</details></li>"


def _chart(histogram: Histogram) -> str:
    most = max(count for _, count in histogram.shown)
    rows = [
        f"<tr><th>{escape(label)}</th><td>{count:,}</td>"
        f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for label, count in histogram.shown
    ]
    return f"<table><caption>{escape(histogram.title)}</caption>{''.join(rows)}</table>"


def _figure(image: Image.Image, row: Row, caption: str) -> str:
    data = base64.b64encode(encode(image)).decode()
    words = f"{escape(_line(cut(caption, PAGE_CAPTION)))}<br>" if caption else ""
    name = escape(_line(row.name))
    held_out = " (held out)" if row.held_out else ""
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{name}">'
        f"<figcaption>{words}<small>{name}{held_out}</small></figcaption></figure>"
    )

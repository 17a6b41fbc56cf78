"""What a user should know about a set of images before training on it: `latentdiff inspect`.

The source is opened by the functions that training uses, with a watcher that collects the problems at which training
would stop. `inspect` measures, `sections` puts it in words.
"""

import bisect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from latentdiff.config import (
    EMBEDDED,
    AutoencoderKLConfig,
    DataConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
    load_config,
    load_data_config,
    stage_of,
)
from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.data.compositions import embedded_folder
from latentdiff.data.shapes import Shape, cut_away, text_of
from latentdiff.data.sources import SHOWN
from latentdiff.data.watcher import Watcher
from latentdiff.evaluation.duplicates import Fingerprint, fingerprint, is_available, near_groups
from latentdiff.figures.grids import captioned_grid, padded, picture
from latentdiff.formats.diffusers_folder import autoencoder_folder, read_config
from latentdiff.images import blended, conversions, format_of, to_images
from latentdiff.models.initial_model import with_initial_model
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.printable import cut, images_of, printable, shown

DEFAULT_SIZE = 512  # pixels
SHEET_IMAGES = 16
SHEET_SIDE = 160  # pixels of an image on the contact sheet
IMAGES_PER_CLASS = 5  # captions that come so often on average look like classes
TOP_CAPTIONS = 5
GROUP_NAMES = 4  # of a group of duplicates
_ABOUT_CAPTIONS = re.compile(r"captions: |several captions: |without a caption, ")
CLIP_TOKENS = 77
# What this project measured (docs/LOG.md): the embedded drawings, and the demo's combinations of 24 of the objects.
MEMORISED, COMPOSED = 112, 2352


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """How the images would be trained on. tokens: that the text encoder reads of a caption, start and end included.

    captions_needed: whether a source without captions is refused. multiple: of pixels, that the networks need of a
    side. batch_size, steps: None without a training config.
    """

    data: DataConfig
    channels: int = 3
    tokens: int = CLIP_TOKENS
    captions_needed: bool = True
    multiple: int = 1
    batch_size: int | None = None
    steps: int | None = None


def read_settings(source: str | None, size: int | None, config: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a training config, or of a source and a size alone, with overrides.

    Raises ValueError if there is no source, or the config or an override is wrong.
    """
    if config is None:
        if source is None:
            raise ValueError("SOURCE is missing, must be a folder, an archive, a parquet file, a hub id or embedded")
        return Settings(load_data_config(source, size or DEFAULT_SIZE, overrides))
    given = list(overrides)
    given += [] if source is None else [f"data.source={_yaml_text(source)}"]
    given += [] if size is None else [f"data.size={size}"]
    if stage_of(config) == "vae":
        stage1 = load_config(VAETrainingConfig, config, given)
        train, model = stage1.train, stage1.model
        return Settings(
            stage1.data, model.in_channels, CLIP_TOKENS, False, model.downsampling, train.batch_size, train.steps
        )
    stage2 = load_config(UNetTrainingConfig, config, given, with_initial_model)
    tokens = (stage2.text.config or {}).get("max_position_embeddings", CLIP_TOKENS)
    train = stage2.train
    channels, downsampling = _pixels_of(stage2)
    multiple = downsampling * stage2.model.downsampling
    return Settings(stage2.data, channels, tokens, True, multiple, train.batch_size, train.steps)


def _yaml_text(text: str) -> str:
    """A text as YAML takes it for one."""
    return "'" + text.replace("'", "''") + "'"


def _pixels_of(config: UNetTrainingConfig) -> tuple[int, int]:
    """Channels of the images and their downsampling: the autoencoder's, or 3 and 8 if that is not there yet."""
    if config.vae is None:
        return config.model.in_channels, 1
    folder = Path(config.vae).expanduser()
    path = (autoencoder_folder(folder) if folder.is_dir() else folder) / "config.json"
    if not path.is_file():
        return 3, 8
    vae = AutoencoderKLConfig.from_diffusers(read_config(path, "AutoencoderKL"), str(path))
    return vae.in_channels, vae.downsampling


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Measured:
    """A file, by its content alone. width, height: upright. print: None without the library of the hashes."""

    format: str
    width: int
    height: int
    conversions: tuple[str, ...]
    print: Fingerprint | None

    @property
    def shorter(self) -> int:
        """Pixels."""
        return min(self.width, self.height)


@dataclass
class Collector(Watcher):
    """Collects what training refuses, warns of and reads. measured: files by digest."""

    config: DataConfig
    hashed: bool
    problems: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)

    def refuse(self, message: str) -> None:
        if message not in self.problems:
            self.problems.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def unreadable(self, files: Sequence[str]) -> None:
        self.unread.extend(files)

    def look(self, digest: str, content: bytes, image: Image.Image) -> None:
        if digest in self.measured:
            return
        changes = [
            *conversions(content),
            *(["with an alpha channel"] if image.has_transparency_data else []),
        ]
        self.measured[digest] = Measured(
            format_of(content),
            image.width,
            image.height,
            tuple(changes),
            fingerprint(blended(image, self.config.background)) if self.hashed else None,
        )


@dataclass(frozen=True)
class Row:
    """An image of the set.

    name: within the source; captions: none if it has none; index: in its half of the set; shape: (height, width) as it
    is trained on, pixels.
    """

    name: str
    captions: list[str]
    digest: str
    file: Measured
    held_out: bool
    index: int
    shape: Shape

    @property
    def cut_away(self) -> float:
        """The fraction of the image that the crop to its shape leaves out."""
        return cut_away((self.file.height, self.file.width), self.shape)

    @property
    def is_enlarged(self) -> bool:
        """Whether it is smaller than its shape."""
        return self.file.height < self.shape[0] or self.file.width < self.shape[1]


@dataclass(frozen=True)
class Inspection:
    """What was found. problems: what training refuses; warned: what it warns of; unread: files and causes.

    rows: training images, then held-out ones. near: groups of near-duplicates, as rows' indices; None if they could
    not be looked for. tokens: of each different caption, start and end included.
    """

    settings: Settings
    images: CaptionedImages | None
    held_out: CaptionedImages | None
    rows: list[Row]
    problems: list[str]
    warned: list[str]
    unread: list[str]
    near: list[list[int]] | None
    tokens: dict[str, int]

    @property
    def training(self) -> list[Row]:
        return [row for row in self.rows if not row.held_out]

    @property
    def captioned(self) -> bool:
        return any(row.captions for row in self.rows)

    @property
    def same(self) -> list[list[Row]]:
        """Groups of files of equal content."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.digest, []).append(row)
        return [group for group in groups.values() if len(group) > 1]

    def picture(self, row: Row, side: int) -> Image.Image:
        """An image as the model sees it, at most `side` pixels wide or enlarged to about that."""
        half = self.held_out if row.held_out else self.images
        assert half is not None
        return picture(to_images(half.pixels(row.index)[None])[0], side)

    def sheet(self) -> list[Row]:
        """A few training images, the same in every run."""
        rows = self.training or self.rows
        step = max(1, len(rows) // SHEET_IMAGES)
        return rows[::step][:SHEET_IMAGES]


def inspect(settings: Settings, progress: bool) -> Inspection:
    """Read every image of a source as training would, and measure it. Problems are collected, not raised."""
    config = settings.data
    watcher = Collector(config, is_available())
    images = held_out = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            images, held_out = open_images(
                config,
                settings.channels,
                0,
                progress,
                settings.captions_needed,
                settings.multiple,
                settings.batch_size or 1,
                watcher,
            )
        except ValueError as error:  # there is nothing to look at
            watcher.refuse(str(error))
        halves = [half for half in (images, held_out) if half is not None]
        rows = [row for half in halves for row in _rows(half, half is held_out, watcher, progress)]
    if images is not None and len(images) > 0 and settings.batch_size is not None:
        with watcher.reporting():
            _check_batch(settings, settings.batch_size, images)
    tokenizer = CLIPTokenizer.load()
    captions = dict.fromkeys(caption for row in rows for caption in row.captions)
    bar = tqdm(captions, "count tokens", disable=not progress, leave=False)
    tokens = {caption: sum(map(len, tokenizer.words(caption))) + 2 for caption in bar}
    near = _near(rows) if watcher.hashed else None
    return Inspection(settings, images, held_out, rows, watcher.problems, watcher.warned, watcher.unread, near, tokens)


def _check_batch(settings: Settings, batch_size: int, images: CaptionedImages) -> None:
    """Raise ValueError as the first step of training does."""
    config = settings.data
    plan = BatchPlan(batch_size, micro=batch_size, processes=1)
    groups = images.by_shape()
    StepBatches(
        len(images),
        plan,
        0,
        0,
        0,
        1,
        config.repeat,
        groups,
        images.repeats,
        holdout=config.used_holdout,
    )


def _rows(images: CaptionedImages, held_out: bool, watcher: Collector, progress: bool) -> Iterator[Row]:
    root = _root(
        images.config.validation_source if held_out and images.config.validation_source else images.config.source
    )
    digests = images.digests
    for index in tqdm(range(len(images)), "look at images", disable=not progress, leave=False):
        digest = digests[index]
        if digest not in watcher.measured:  # images that are drawn here are not read when they are opened
            content = images.entry(index)["bytes"]
            watcher.look(digest, content, images.image(index))
        name = images.name(index).removeprefix(root).lstrip("/:")
        captions = [caption for caption in images.captions_of(index) if caption.strip()]
        yield Row(name, captions, digest, watcher.measured[digest], held_out, index, images.shape(index))


def _root(source: str) -> str:
    """What the addresses of a source's files begin with."""
    return str(embedded_folder() if source == EMBEDDED else Path(source).expanduser())


def _near(rows: Sequence[Row]) -> list[list[int]]:
    """Groups of rows that are near-duplicates; files of equal content alone make no group."""
    files: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        files.setdefault(row.digest, []).append(i)
    prints = [one for own in files.values() if (one := rows[own[0]].file.print) is not None]
    members = list(files.values())
    return [sorted(i for file in group for i in members[file]) for group in near_groups(prints)]


# ----------------------------------------------------------------------------------------------------------------------
# In words


@dataclass(frozen=True)
class Finding:
    """A sentence, and the names that it is about."""

    text: str
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Histogram:
    """How many there are of each kind."""

    title: str
    bars: Sequence[tuple[str, int]]

    @property
    def shown(self) -> Sequence[tuple[str, int]]:
        """Without the empty bars at both ends."""
        full = [i for i, (_, count) in enumerate(self.bars) if count]
        return self.bars[full[0] : full[-1] + 1]


@dataclass(frozen=True)
class Section:
    """A part of the report. groups: rows of images to show side by side."""

    title: str
    findings: Sequence[Finding]
    histograms: Sequence[Histogram] = ()
    groups: Sequence[Sequence[Row]] = ()


def sections(found: Inspection) -> list[Section]:
    """The report; a part that has nothing to say is left out."""
    parts = [_problems(found)]
    if found.rows:
        parts += [_files(found), _shapes(found), _captions(found), _duplicates(found), _held_out(found)]
        parts.append(_expectations(found))
    return [part for part in parts if part.findings or part.histograms]


def _problems(found: Inspection) -> Section:
    findings = [Finding(problem) for problem in found.problems]
    findings = findings or [Finding("None: training would start.")]
    if len(found.unread) > SHOWN:  # the message above does not name them all
        findings.append(Finding(f"files that cannot be read: {len(found.unread):,}", found.unread))
    return Section("Problems: training would refuse this" if found.problems else "Problems", findings)


def _files(found: Inspection) -> Section:
    rows = found.rows
    formats = Counter(row.file.format for row in rows)
    findings = [Finding(f"readable: {len(rows):,} ({_listed(formats)})")]
    # What the notes say about captions stands there.
    notes = found.images.notes if found.images is not None else ()
    findings += [Finding(note) for note in notes if not _is_about_captions(note)]
    findings += [Finding(warning) for warning in found.warned]
    for change in dict.fromkeys(change for row in rows for change in row.file.conversions):
        names = [row.name for row in rows if change in row.file.conversions]
        everything = len(names) == len(rows)
        findings.append(Finding(f"{change}: {'all' if everything else f'{len(names):,}'}", [] if everything else names))
    return Section("Images", findings)


def _is_about_captions(note: str) -> bool:
    return _ABOUT_CAPTIONS.match(note.removeprefix("held out: ")) is not None


def _shapes(found: Inspection) -> Section:
    rows, images = found.rows, found.images
    assert images is not None
    sides = [row.file.shorter for row in rows]
    several = len(images.layout.shapes) > 1
    how = f"{'in' if several else 'at'} {images.layout}"
    findings = [Finding(f"shorter side: {min(sides):,} to {max(sides):,} px, trained {how}")]
    if several:
        counts = Counter(row.shape for row in rows)
        named = [f"{text_of(shape)}: {counts[shape]:,}" for shape in images.layout.shapes]
        findings.append(Finding("buckets (height x width: images)", named))
    small = sorted((row for row in rows if row.is_enlarged), key=lambda row: row.file.shorter)
    if small:
        named = [f"{row.name} ({row.file.width} x {row.file.height})" for row in small]
        findings.append(Finding(f"smaller than the training size, so enlarged: {len(small):,}", named))
    cut_rows = sorted((row for row in rows if row.cut_away > 0), key=lambda row: -row.cut_away)
    where = "centre crop" if found.settings.data.crop == "center" else "random crop (another part in each epoch)"
    if cut_rows:
        mean = sum(row.cut_away for row in rows) / len(rows)
        worst = cut_rows[0].cut_away
        named = [f"{row.name} ({row.cut_away:.0%})" for row in cut_rows]
        findings.append(Finding(f"the {where} cuts away {mean:.1%} of an image on average, {worst:.1%} at most", named))
    else:
        findings.append(Finding("all have the shape that is trained on: the crop cuts nothing away"))
    size = min(images.config.shape)
    return Section("Sizes and crop", findings, [_side_histogram(sides, size), _aspect_histogram(rows)])


def _side_histogram(sides: Sequence[int], size: int) -> Histogram:
    """Shorter sides by powers of two of the training size."""
    edges = [max(1, size // 4), max(2, size // 2), size, 2 * size, 4 * size]
    labels = [f"below {edges[0]:,}"]
    labels += [f"{low:,} to {high - 1:,}" for low, high in zip(edges, edges[1:], strict=False)]
    return Histogram("shorter side, px", _binned(sides, edges, [*labels, f"{edges[-1]:,} and more"]))


def _aspect_histogram(rows: Sequence[Row]) -> Histogram:
    names = ["1:2", "2:3", "4:5", "5:4", "3:2", "2:1"]
    edges = [1 / 2, 2 / 3, 4 / 5, 5 / 4, 3 / 2, 2 / 1]
    labels = ["below 1:2"] + [f"{low} to {high}" for low, high in zip(names, names[1:], strict=False)]
    ratios = [row.file.width / row.file.height for row in rows]
    return Histogram("width : height", _binned(ratios, edges, [*labels, "2:1 and more"]))


def _binned(values: Sequence[float], edges: Sequence[float], labels: Sequence[str]) -> list[tuple[str, int]]:
    """How many values are below the first edge, from each edge to below the next, and from the last on."""
    counts = Counter(bisect.bisect_right(edges, value) for value in values)
    return [(label, counts[i]) for i, label in enumerate(labels)]


def _captions(found: Inspection) -> Section:
    notes = found.images.notes if found.images is not None else ()
    findings = [Finding(note) for note in notes if _is_about_captions(note)]
    if not found.captioned:
        return Section("Captions", findings)
    rows, limit = found.rows, found.settings.tokens
    missing = [row.name for row in rows if not row.captions]
    if missing:
        findings.append(Finding(f"images without a caption: {len(missing):,}", missing))
    uses = Counter(caption for row in rows for caption in row.captions)
    findings.append(Finding(f"different captions: {len(uses):,}, of {uses.total():,}"))
    repeated = [(caption, count) for caption, count in uses.most_common(TOP_CAPTIONS) if count > 1]
    if repeated:
        named = [f"{count} x {shown(cut(caption, 80))}" for caption, count in repeated]
        findings.append(Finding("the most frequent ones", named))
    if len(uses) > 1 and uses.total() >= IMAGES_PER_CLASS * len(uses):
        average = uses.total() / len(uses)
        findings.append(Finding(f"captions look like classes: each comes {average:.0f} times on average"))
    long = {row.name: max(found.tokens[caption] for caption in row.captions) for row in rows if row.captions}
    named = [f"{name} ({count} tokens)" for name, count in sorted(long.items(), key=_by_count) if count > limit]
    if named:
        findings.append(
            Finding(f"images with captions of more than {limit} tokens, whose rest is cut off: {len(named):,}", named)
        )
    counts = [found.tokens[caption] for row in rows for caption in row.captions]
    return Section("Captions", findings, [_token_histogram(counts, limit)])


def _by_count(entry: tuple[str, int]) -> int:
    return -entry[1]


def _token_histogram(counts: Sequence[int], limit: int) -> Histogram:
    edges = [edge for edge in (3, 11, 21, 41, 61) if edge <= limit] + [limit + 1]
    labels = ["no words"] + [
        f"{low} to {high - 1}" if low < high - 1 else f"{low}" for low, high in zip(edges, edges[1:], strict=False)
    ]
    title = "CLIP tokens of a caption, start and end included"
    return Histogram(title, _binned(counts, edges, [*labels, f"more than {limit}"]))


def _duplicates(found: Inspection) -> Section:
    findings: list[Finding] = []
    same = found.same
    if same:
        named = [_joined(" = ", group) for group in same]
        findings.append(Finding(f"groups of equal files: {len(same):,} ({sum(map(len, same)):,} images)", named))
        differ = [group for group in same if len({tuple(row.captions) for row in group}) > 1]
        if differ:
            named = [_joined(" = ", group) for group in differ]
            findings.append(Finding(f"of these with different captions: {len(differ):,}", named))
    else:
        findings.append(Finding("equal files: none"))
    if found.near is None:
        findings.append(Finding('near-duplicates were not looked for: that needs pip install "latentdiff[inspect]"'))
        return Section("Duplicates", findings)
    groups = sorted(([found.rows[i] for i in group] for group in found.near), key=len, reverse=True)
    if groups:
        named = [_joined(" ~ ", group) for group in groups]
        findings.append(
            Finding(f"groups of near-duplicates: {len(groups):,} ({sum(map(len, groups)):,} images)", named)
        )
        seen = [row.name for group in groups for row in group if row.held_out and any(not r.held_out for r in group)]
        if seen:
            text = f"held out with a near-duplicate in training, so that validation looks too good: {len(seen):,}"
            findings.append(Finding(text, seen))
    else:
        findings.append(Finding("near-duplicates: none"))
    return Section("Duplicates", findings, groups=groups)


def _joined(sign: str, group: Sequence[Row]) -> str:
    """The first names of a group."""
    more = len(group) - GROUP_NAMES
    return sign.join(row.name for row in group[:GROUP_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _held_out(found: Inspection) -> Section:
    config = found.settings.data
    held = [row.name for row in found.rows if row.held_out]
    if not held:
        return Section("Held out", [Finding("nothing; data.holdout=N holds N images out for validation")])
    if config.validation_source is not None or config.validation_split is not None:
        origin = config.validation_source or f"the split {config.validation_split}"
    else:
        origin = f"data.holdout={config.holdout}, the same ones in every run"
    findings = [Finding(f"{images_of(len(held))} to validate on ({shown(origin)})", held)]
    trained = {row.digest for row in found.training}
    if any(row.held_out and row.digest in trained for row in found.rows):
        findings.append(Finding("some of these files are trained on too"))
    else:
        findings.append(Finding("none of these files is trained on (training images of equal content are left out)"))
    return Section("Held out", findings)


def _expectations(found: Inspection) -> Section:
    """Only what this project measured, and what follows from the numbers of the config."""
    settings, count = found.settings, len(found.training)
    if count <= MEMORISED:
        place = "no more than in the first: expect copies of them"
    elif count < COMPOSED:
        place = "more than in the first and fewer than in the second"
    else:
        place = "as many as in the second or more, which says little where images are no combinations of few parts"
    findings = [
        Finding(
            f"measured here (docs/LOG.md): a model memorised {MEMORISED} drawings; another one, trained on "
            f"{COMPOSED:,} combinations of a few drawn objects, colours and backgrounds, drew combinations that it had "
            f"never seen. These are {count:,} training images, {place}"
        ),
        Finding("nothing was measured here on photographs, or on captions that people wrote"),
        Finding(
            "a small set is memorised: the validation loss falls, then rises, long before a run ends. With images held "
            "out the weights of its minimum are published (docs/training.md)"
        ),
    ]
    if settings.batch_size is not None and settings.steps is not None and found.images is not None and count:
        epoch = sum(found.images.repeats or [1] * count)
        times = settings.steps * settings.batch_size / epoch
        findings.append(
            Finding(f"{settings.steps:,} steps of {settings.batch_size} images are {times:,.1f} epochs of this set")
        )
    return Section("What to expect", findings)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())


def contact_sheet(found: Inspection) -> Image.Image:
    """A few images as the model sees them, each with its caption underneath. Raises ValueError without images."""
    rows = found.sheet()
    if not rows:
        raise ValueError("there is no image to show")
    pictures = [found.picture(row, SHEET_SIDE) for row in rows]
    cells = [[one] for one in padded(pictures)]
    captions = [printable(caption_of(row)).replace("\n", " ") for row in rows]
    return captioned_grid(cells, captions, columns=4)


def caption_of(row: Row) -> str:
    """The first caption of an image, or what stands in its place."""
    return row.captions[0] if row.captions else "(no caption)"

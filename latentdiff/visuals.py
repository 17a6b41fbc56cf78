"""Pictures of the process: animations, labelled tables of pictures, the forward process, quick previews of latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentdiff.diffusion import NoiseSchedule
from latentdiff.formats.diffusers_folder import read_json, replacing, write_json
from latentdiff.models.modes import evaluating

if TYPE_CHECKING:
    from latentdiff.models.autoencoder import AutoencoderKL

LAST_FRAME_SECONDS = 1
MAX_GIF_FPS = 50  # viewers slow down files that ask for more
H264_QUALITY = "18"  # x264's constant rate factor: hardly told from the original

# ----------------------------------------------------------------------------------------------------------------------
# Animations


def write_animation(frames: Sequence[Image.Image], path: Path, fps: float = 10) -> None:
    """Write frames of one size as .gif or .mp4, by the suffix of `path`, atomically; the last one stays for a second.

    fps: frames a second, above 0.
    Raises ValueError for another suffix, and as `write_gif` and `write_mp4` do.
    """
    writers = {".gif": write_gif, ".mp4": write_mp4}
    path = Path(path)
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path} must end in {' or '.join(writers)}")
    writers[path.suffix.lower()](frames, path, fps)


def write_gif(frames: Sequence[Image.Image], path: Path, fps: float = 10) -> None:
    """Write a repeating GIF atomically, each frame with its own 256 colours; the last one stays for a second.

    Frames equal to the one before prolong it instead of being stored. fps: above 0, at most 50.
    Raises ValueError for other rates, no frames, or frames of different sizes.
    """
    _check_animation(frames, fps)
    if fps > MAX_GIF_FPS:
        raise ValueError(f"fps is {fps}, a GIF takes at most {MAX_GIF_FPS}")
    # GIF counts in hundredths of a second; rounding the frames' ends keeps the rate right on average.
    ends = [round(100 * i / fps) for i in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]
    durations[-1] = max(durations[-1], 1000 * LAST_FRAME_SECONDS)
    first, *rest = (frame.convert("RGB") for frame in frames)
    with replacing(Path(path)) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def write_mp4(frames: Sequence[Image.Image], path: Path, fps: float = 10) -> None:
    """Write an H.264 video (yuv420p, BT.709) atomically; the last frame is repeated so that it stays for a second.

    Odd sizes get one more row or column, equal to the last one. fps: above 0.
    Raises ValueError without PyAV, for other rates, no frames, or frames of different sizes.
    """
    _check_animation(frames, fps)
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: writing mp4 needs PyAV: pip install av") from None
    held = max(round(fps * LAST_FRAME_SECONDS) - 1, 0)
    with replacing(Path(path)) as temporary:
        # faststart: the index comes first, so that a browser can play while it loads
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height = (side + side % 2 for side in frames[0].size)
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": H264_QUALITY}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = av.video.reformatter.Colorspace.ITU709
            context.color_range = av.video.reformatter.ColorRange.MPEG
            for frame in (*frames, *[frames[-1]] * held):
                rgb = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
                container.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace="itu709")))
            container.mux(stream.encode())


def _check_animation(frames: Sequence[Image.Image], fps: float) -> None:
    if not (fps > 0 and isfinite(fps)):
        raise ValueError(f"fps is {fps}, must be above 0")
    if not frames:
        raise ValueError("an animation needs at least one frame")
    for i, frame in enumerate(frames):
        if frame.size != frames[0].size:
            raise ValueError(f"frame {i} is {_size(frame)} and frame 0 {_size(frames[0])}, all must have one size")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _even(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8; odd sides are one longer, as a coded colour value stands for 2x2 pixels."""
    array = np.asarray(image.convert("RGB"))
    return np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")


# ----------------------------------------------------------------------------------------------------------------------
# Tables of pictures

FONT_SIZE = 14
GAP = 6  # pixels between pictures, and around labels
ROW_LABEL_WIDTH = 160  # pixels at most
LABEL_LINES = 3  # at most


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Pictures in a table with a label left of each row and above each column; returns RGB.

    A column is as wide as its widest picture, a row as high as its highest, and pictures lie at their top left. Labels
    are wrapped at words to at most three lines, and what then does not fit is cut; if all of one kind are empty they
    take no room.
    Raises ValueError if there is no picture or the numbers of labels are not those of rows and columns.
    """
    _check_table(rows, row_labels, column_labels)
    font = ImageFont.load_default(size=FONT_SIZE)
    widths = [max(image.width for image in column) for column in zip(*rows, strict=True)]
    heights = [max(image.height for image in row) for row in rows]
    above = [_wrapped(label, width, LABEL_LINES, font) for label, width in zip(column_labels, widths, strict=True)]
    lines = [max(1, min(LABEL_LINES, height // _line_height(font))) for height in heights]
    beside = [_wrapped(label, ROW_LABEL_WIDTH, n, font) for label, n in zip(row_labels, lines, strict=True)]
    heights = [max(height, len(text) * _line_height(font)) for height, text in zip(heights, beside, strict=True)]
    margin_left = max(ceil(font.getlength(line)) for text in beside for line in [*text, ""])
    margin_top = max(map(len, above)) * _line_height(font)
    lefts = _places(margin_left, widths)
    tops = _places(margin_top, heights)

    table = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(table)
    for left, width, text in zip(lefts, widths, above, strict=False):
        for i, line in enumerate(text):
            place = (left + width / 2, GAP + margin_top - (len(text) - i) * _line_height(font))
            draw.text(place, line, fill="black", font=font, anchor="ma")
    for top, height, text in zip(tops, heights, beside, strict=False):
        first = top + (height - len(text) * _line_height(font)) / 2
        for i, line in enumerate(text):
            draw.text((GAP + margin_left, first + i * _line_height(font)), line, fill="black", font=font, anchor="ra")
    for top, row in zip(tops, rows, strict=False):
        for left, image in zip(lefts, row, strict=False):
            table.paste(image.convert("RGB"), (left, top))
    return table


def _check_table(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    if not rows or not rows[0]:
        raise ValueError("a table of pictures needs at least one picture")
    if len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row labels for {len(rows)} rows of pictures, must be as many")
    for i, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(f"row {i} has {len(row)} pictures for {len(column_labels)} column labels, must be as many")


def _places(margin: int, sizes: Sequence[int]) -> list[int]:
    """Where each picture starts along a side, and where the table ends: gaps around everything but an absent margin."""
    places = [GAP + margin + (GAP if margin else 0)]
    for size in sizes:
        places.append(places[-1] + size + GAP)
    return places


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _wrapped(text: str, width: int, max_lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of `text` at most `width` pixels wide, broken at spaces; too long a word or text ends in "..."."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines[max_lines - 1 :] = [" ".join(lines[max_lines - 1 :])]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    kept = max((n for n in range(len(line)) if font.getlength(line[:n].rstrip() + "...") <= width), default=0)
    return line[:kept].rstrip() + "..." if kept else ""


# ----------------------------------------------------------------------------------------------------------------------
# The forward process


def forward_strip(
    schedule: NoiseSchedule, clean: Tensor, timesteps: Sequence[int], generator: torch.Generator
) -> Tensor:
    """One picture at growing noise levels: `clean` latents or pixels [C, h, w] -> [len(timesteps), C, h, w].

    All of them have the same noise sample (Ho et al. 2020, eq. 4), which is drawn from `generator` on its device.
    timesteps: each 0 .. T-1. Raises ValueError for others, or for none.
    """
    last = schedule.num_train_timesteps - 1
    if not timesteps:
        raise ValueError("timesteps is empty, must name at least one")
    for timestep in timesteps:
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep {timestep} is not one of the schedule's 0 .. {last}")
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean)
    shape = (len(timesteps), *clean.shape)
    return schedule.add_noise(
        clean.expand(shape), noise.expand(shape), torch.tensor(timesteps, device=clean.device, dtype=torch.int64)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Previews of latents

PREVIEW_FILE = "latent_preview.json"


@dataclass(frozen=True, eq=False)
class LatentPreview:
    """Colours straight from latents, by one linear map a latent pixel: far cheaper than decoding, and coarser.

    weights [3, C] and bias [3], float32: pixels in [-1, 1] = weights @ latents + bias.
    factor: pixels a latent pixel, on a side. r_squared: share of the variance of the shrunken pixels that it explains.
    """

    weights: Tensor
    bias: Tensor
    factor: int
    r_squared: float

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> Self:
        """Least squares from unit-scale latents [N, C, h, w] to pixels [N, 3, H, W], averaged to h x w, in float64.

        Raises ValueError if the shapes do not fit, or all pixels have one colour.
        """
        factor = _factor(latents, pixels)
        x = latents.detach().cpu().double().movedim(1, -1).flatten(0, 2)  # [N * h * w, C]
        y = F.avg_pool2d(pixels.detach().cpu().double(), factor).movedim(1, -1).flatten(0, 2)
        total = (y - y.mean(dim=0)).square().sum()
        if total == 0:
            raise ValueError("all pixels have one colour, from which no preview can be fitted")
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        solution = torch.linalg.lstsq(torch.cat([x, ones], dim=1), y, driver="gelsd").solution  # [C + 1, 3]
        residual = (x @ solution[:-1] + solution[-1] - y).square().sum()
        return cls(solution[:-1].T.float().contiguous(), solution[-1].float(), factor, 1 - (residual / total).item())

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Unit-scale latents [B, C, h, w] -> B pictures of f * h x f * w, smoothly enlarged.

        Raises ValueError if C is not the map's.
        """
        from latentdiff.data import to_images  # imports `datasets`

        if latents.shape[1] != self.weights.shape[1]:
            raise ValueError(f"latents have {latents.shape[1]} channels, the preview takes {self.weights.shape[1]}")
        weights, bias = self.weights.to(latents.device), self.bias.to(latents.device)
        colours = F.conv2d(latents.detach().float(), weights[:, :, None, None], bias)  # [B, 3, h, w]
        return to_images(F.interpolate(colours, scale_factor=self.factor, mode="bilinear", align_corners=False))

    def save(self, folder: Path) -> None:
        """Write `latent_preview.json` into `folder`, atomically."""
        values = {
            "weights": self.weights.tolist(),
            "bias": self.bias.tolist(),
            "factor": self.factor,
            "r_squared": self.r_squared,
        }
        write_json(values, Path(folder) / PREVIEW_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `latent_preview.json`; ValueError if it is missing, or not as `save` writes it."""
        path = Path(folder) / PREVIEW_FILE
        values = read_json(path)
        try:
            weights = torch.tensor(values["weights"], dtype=torch.float32)
            bias = torch.tensor(values["bias"], dtype=torch.float32)
            factor, r_squared = int(values["factor"]), float(values["r_squared"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a latent preview ({type(error).__name__}: {error})") from None
        fits = weights.ndim == 2 and len(weights) == 3 and bias.shape == (3,)
        if not fits or factor < 1 or not (weights.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{path} must hold finite weights [3, C], a bias [3] and a factor of at least 1")
        return cls(weights, bias, factor, r_squared)


def _factor(latents: Tensor, pixels: Tensor) -> int:
    """Pixels a latent pixel, on a side; ValueError if the two do not belong together."""
    count, height, width = latents.shape[0], *latents.shape[2:]
    factor = pixels.shape[2] // height
    if factor < 1 or pixels.shape != (count, 3, factor * height, factor * width):
        raise ValueError(
            f"pixels {list(pixels.shape)} do not fit latents {list(latents.shape)}: they must be [{count}, 3, "
            f"f * {height}, f * {width}]"
        )
    return factor


def fit_preview(vae: "AutoencoderKL", batches: Iterable[Tensor]) -> LatentPreview:
    """The preview of an autoencoder's latents (posterior means), fitted to batches of pixels [b, 3, H, W] in [-1, 1].

    A few dozen pictures are enough: each latent pixel counts, for C + 1 unknowns a colour.
    Raises ValueError if there is no batch, and as `vae.encode` and `LatentPreview.fit` do.
    """
    latents, pixels = [], []
    with torch.no_grad(), evaluating(vae):
        for batch in batches:
            latents.append(vae.sample(vae.encode(batch.to(vae.device, vae.dtype))).float().cpu())
            pixels.append(batch.float().cpu())
    if not latents:
        raise ValueError("fitting a preview needs at least one batch of pictures")
    return LatentPreview.fit(torch.cat(latents), torch.cat(pixels))

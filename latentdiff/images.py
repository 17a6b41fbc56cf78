"""Images and pixels: decoding, resizing and cropping, and the one conversion between 8-bit images and pixels."""

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_SIDE = 16_384  # pixels, of an image that is trained on or generated
IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class View:
    """Crop position in [0, 1] (x, y; 0.5 is the centre) and left-right flip of an image."""

    crop: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


# What is opened as an image. Pillow knows more, such as EPS, for which it runs another program.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"),
    *("DDS", "PCX", "QOI", "SGI", "XBM"),
)
# What reading a file as an image can raise.
READ_ERRORS = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


def decode(entry: Mapping[str, bytes | str | None]) -> Image.Image:
    """An image from its bytes or its path, fully read and upright (EXIF).

    Raises one of READ_ERRORS, also for a file of another format than FORMATS and for what is no ordinary file.
    """
    content = entry.get("bytes")
    source = io.BytesIO(content) if isinstance(content, bytes) else entry.get("path")
    if source is None:
        raise ValueError("no image")
    if isinstance(source, str) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("not a file")  # reading a pipe would wait for ever
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # AVIF needs Pillow 11.3
    with Image.open(source, formats=known) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def encode(image: Image.Image) -> bytes:
    """A PNG file of the image, made fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def prepare(
    image: Image.Image, size: tuple[int, int], channels: int, background: tuple[int, int, int], view: View
) -> Image.Image:
    """Convert to `channels`, blend transparency with `background`, resize and crop to size (width, height), flip."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values instead of scaling them
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data and channels in (1, 3):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    image = image.convert(IMAGE_MODES[channels])
    image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=view.crop)
    return ImageOps.mirror(image) if view.flip else image


def to_pixels(image: Image.Image) -> Tensor:
    """An image of 1 to 4 channels, 0..255 -> [C, H, W] float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    values = values[..., None] if values.ndim == 2 else values
    return from_bytes(values.permute(2, 0, 1))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, C, H, W] in [-1, 1] -> images: the inverse of `to_pixels`; values beyond the range are clamped."""
    arrays = to_bytes(pixels.float()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> values 0 .. 255, uint8; exact for 8-bit images, values beyond the range are clamped."""
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(values: Tensor) -> Tensor:
    """Values 0 .. 255 -> pixels in [-1, 1], float32."""
    return values.float() / 127.5 - 1.0

"""Images and pixels: decoding, resizing and cropping, and the one conversion between 8-bit images and pixels."""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentdiff.archives import read_file
from latentdiff.printable import first_line

MAX_SIDE = 16_384  # pixels, of an image that is trained on or generated
ANIMATED = "latentdiff_animated"  # in an image's info, if it is the first of a file's several
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
HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # read with the extra "heic"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# What reading a file as an image can raise.
READ_ERRORS = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


def decode(entry: Mapping[str, Any]) -> Image.Image:
    """An image from its bytes or its path, fully read and normalized; of several frames, the first.

    Raises one of READ_ERRORS, also for a file of another format than FORMATS and for what is no ordinary file.
    """
    content = content_of(entry)
    try:
        image = _opened(content)
        image.load()
    except UnidentifiedImageError:
        raise OSError("not an image of a known format" if content else "an empty file") from None
    except READ_ERRORS:
        raise
    except Exception as error:  # a decoder may raise anything for damaged bytes
        raise OSError(first_line(error)) from error
    with image:
        moves = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo with a preview
        ready = normalized(image)
        if moves:
            ready.info[ANIMATED] = True
        return ready


def _opened(content: bytes) -> Image.Image:
    """An image whose header alone is read."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # AVIF needs Pillow 11.3
    if content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS:
        _register_heif()
        known.append("HEIF")
    return Image.open(io.BytesIO(content), formats=known)


def format_of(content: bytes) -> str:
    """The format of an image file that can be decoded, such as "PNG"."""
    with _opened(content) as image:
        return image.format or "?"


def conversions(content: bytes) -> list[str]:
    """In words, what decoding a readable image file changes: colours, depth, orientation."""
    with _opened(content) as image:
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        changes = {
            "turned upright (EXIF)": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            "scaled from 16 or 32 bits to 8": deep,
            "converted from CMYK": image.mode == "CMYK",
            "converted to sRGB (ICC profile)": image.mode != "CMYK"
            and not deep
            and _foreign_profile(image) is not None,
        }
    return [change for change, made in changes.items() if made]


def content_of(entry: Mapping[str, Any]) -> bytes:
    """The bytes of an undecoded image: its own, or those of the file at its path. Raises OSError or ValueError.

    entry: {"bytes", "path"}, one of which may be None; and "place" (`archives.Place`), where it is in a tar file.
    """
    content, path = entry.get("bytes"), entry.get("path")
    if content is None and path is None:
        raise ValueError("no image")
    return content if isinstance(content, bytes) else read_file(str(path), entry.get("place"))


def _register_heif() -> None:
    """Let Pillow read HEIF; OSError without the package for it."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise OSError('HEIC images need another package: pip install "latentdiff[heic]"') from None
    register_heif_opener(thumbnails=False)


def encode(image: Image.Image) -> bytes:
    """A PNG file of the image, made fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def normalized(image: Image.Image) -> Image.Image:
    """The image upright (EXIF), in 8 bits and in the colours of sRGB.

    Raises ValueError for values that are not finite or below 0.
    """
    return _in_srgb(_in_8_bits(ImageOps.exif_transpose(image)))


def prepare(
    image: Image.Image, size: tuple[int, int], channels: int, background: tuple[int, int, int], view: View
) -> Image.Image:
    """Convert a normalized image to `channels`, blend transparency with `background`, resize and crop to size, flip.

    size: (width, height).
    """
    if channels in (1, 3):
        image = blended(image, background)
    image = image.convert(IMAGE_MODES[channels])
    image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=view.crop)
    return ImageOps.mirror(image) if view.flip else image


def blended(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A transparent image on a background; others as they are."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Values of more bits scaled to 0..255, where Pillow would clip them; other images as they are.

    16-bit values are of 0..65535. Files of 32-bit integers and floats don't say what white is: it is taken for the
    first of 1 (floats), 255, 65535 and 2^31 - 1 that no value exceeds.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"it has values in {values.min()} .. {values.max()}, must be finite and at least 0")
    whites = [*([1] if image.mode == "F" else []), 255, 65_535, 2**31 - 1]
    white = next((white for white in whites if values.max() <= white), values.max())
    return Image.fromarray((values / white * 255).round().astype(np.uint8))


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours converted by the image's embedded ICC profile; without one, or with an unusable one, they are sRGB's."""
    source = _foreign_profile(image)
    if source is None:
        return image
    grey = image.mode in ("1", "L", "LA")
    alpha = image.convert("LA" if grey else "RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image if image.mode == "CMYK" else image.convert("L" if grey else "RGB")
    try:
        converted = ImageCms.profileToProfile(
            colours,
            source,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """An image's embedded ICC profile, if there is a usable one that is not sRGB's."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return None if "sRGB" in ImageCms.getProfileDescription(source) else source
    except (ImageCms.PyCMSError, OSError):
        return None


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

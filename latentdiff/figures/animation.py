"""Animations as GIF and MP4 files."""

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite
from pathlib import Path

import numpy as np
from PIL import Image

LAST_FRAME_SECONDS = 1
MAX_GIF_FPS = 50  # viewers slow down files that ask for more
H264_QUALITY = "18"  # x264's constant rate factor: hard to distinguish from the original


def write_gif(frames: Sequence[Image.Image], path: Path, fps: float = 10) -> None:
    """Write a GIF that repeats, each frame with its own 256 colours; the last one stays for a second.

    A frame that equals the one before prolongs it instead of being stored. fps: frames per second, at most 50.
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
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def write_mp4(frames: Sequence[Image.Image], path: Path, fps: float = 10) -> None:
    """Write an H.264 video (yuv420p, BT.709); the last frame is repeated so that it stays for a second.

    Odd sizes get one more row or column, equal to the last one. fps: frames per second, above 0.
    Raises ValueError without PyAV, for other rates, no frames, or frames of different sizes.
    """
    _check_animation(frames, fps)
    try:
        import av
        from av.video.reformatter import ColorRange, Colorspace
    except ImportError:
        raise ValueError("writing mp4 needs PyAV: pip install av") from None
    repeats = max(round(fps * LAST_FRAME_SECONDS) - 1, 0)
    # faststart: the index comes first, so that a browser can play while it loads
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": H264_QUALITY}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        for frame in (*frames, *[frames[-1]] * repeats):
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

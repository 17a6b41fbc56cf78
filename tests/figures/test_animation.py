"""Animations, read back from their files."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import latentdiff
from latentdiff.figures.animation import write_gif, write_mp4

APPLE = Path(latentdiff.__file__).parent / "assets" / "emoji" / "noto" / "1f34e.webp"
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (33, 25)) -> Image.Image:
    return Image.new("RGB", size, colour)


FRAMES = [solid(colour) for colour in COLOURS]


def read_gif(path: Path) -> list[tuple[int, tuple[int, int, int], tuple[int, int]]]:
    """Each frame's duration in ms, colour and size."""
    frames = []
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # repeats forever
        for i in range(image.n_frames):
            image.seek(i)
            frames.append((image.info["duration"], image.convert("RGB").getpixel((5, 5)), image.size))
    return frames


def test_gif_holds_its_last_frame(tmp_path):
    write_gif(FRAMES, tmp_path / "a.gif", fps=10)
    durations, colours, sizes = zip(*read_gif(tmp_path / "a.gif"), strict=True)
    assert durations == (100, 100, 100, 1000)
    assert list(colours) == COLOURS and set(sizes) == {(33, 25)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_gif_keeps_the_rate_on_average(tmp_path):
    """30 frames per second last 3.33 hundredths each."""
    frames = [solid((8 * i, 0, 0)) for i in range(31)]
    write_gif(frames, tmp_path / "a.gif", fps=30)
    durations = [frame[0] for frame in read_gif(tmp_path / "a.gif")]
    assert len(durations) == 31 and set(durations[:-1]) == {30, 40} and sum(durations[:-1]) == 1000


def test_slow_gif_does_not_shorten_its_last_frame(tmp_path):
    write_gif(FRAMES, tmp_path / "a.gif", fps=0.5)
    assert [frame[0] for frame in read_gif(tmp_path / "a.gif")] == [2000] * 4


def test_mp4_has_every_frame(tmp_path):
    write_mp4(FRAMES, tmp_path / "a.mp4", fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert stream.duration * stream.time_base == 11 / 8
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert [time for time, _ in frames] == [i / 8 for i in range(11)]  # the fourth frame stays for a second
    assert {array.shape for _, array in frames} == {(26, 34, 3)}  # 33 x 25, made even
    for (_, array), colour in zip(frames, [*COLOURS, *[COLOURS[-1]] * 7], strict=True):
        assert np.abs(array.astype(int) - colour).max() <= 3  # the last row and column too: they are repeated
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # can be played while it loads
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_mp4_of_a_real_image_is_close_to_it(tmp_path):
    with Image.open(APPLE) as file:
        image = file.convert("RGB").resize((64, 64))
    write_mp4([image], tmp_path / "a.mp4", fps=2)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 2
    assert np.abs(frames[0].astype(int) - np.asarray(image)).mean() < 4  # the halved colour resolution costs most of it


@pytest.mark.parametrize("write", [write_gif, write_mp4])
@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 10, "at least one frame"),
        ([*FRAMES, solid((0, 0, 0), (8, 9))], 10, "frame 4 is 8x9 and frame 0 33x25"),
        (FRAMES, 0, "fps is 0, must be above 0"),
        (FRAMES, float("nan"), "fps is nan"),
    ],
)
def test_wrong_animations_write_nothing(tmp_path, write, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write(frames, tmp_path / "a", fps)
    assert list(tmp_path.iterdir()) == []


def test_gif_rate_is_limited(tmp_path):
    with pytest.raises(ValueError, match="fps is 60, a GIF takes at most 50"):
        write_gif(FRAMES, tmp_path / "a.gif", fps=60)


def test_mp4_needs_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV: pip install av"):
        write_mp4(FRAMES, tmp_path / "a.mp4")

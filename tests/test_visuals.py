"""Animations read back from their files, tables of images, the forward process and previews of latents."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentdiff.config import DataConfig
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.figures.animation import write_animation, write_gif, write_mp4
from latentdiff.figures.grids import labelled_grid
from latentdiff.images import to_pixels
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.pipeline.preview import LatentPreview, fit_preview, forward_strip

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (33, 25)) -> Image.Image:
    return Image.new("RGB", size, colour)


FRAMES = [solid(colour) for colour in COLOURS]

# --- animations ---


def read_gif(path: Path) -> list[tuple[int, tuple[int, int, int], tuple[int, int]]]:
    """Each frame's duration in ms, colour and size."""
    frames = []
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # endless
        for i in range(image.n_frames):
            image.seek(i)
            frames.append((image.info["duration"], image.convert("RGB").getpixel((5, 5)), image.size))
    return frames


def test_gif_holds_its_last_frame(tmp_path):
    write_gif(FRAMES, tmp_path / "a.gif", fps=10)
    durations, colours, sizes = zip(*read_gif(tmp_path / "a.gif"), strict=True)
    assert durations == (100, 100, 100, 1000)
    assert list(colours) == COLOURS and set(sizes) == {(33, 25)}
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]  # nothing beside it


def test_gif_keeps_the_rate_on_average(tmp_path):
    """30 a second are 3.33 hundredths each."""
    frames = [solid((8 * i, 0, 0)) for i in range(31)]
    write_gif(frames, tmp_path / "a.gif", fps=30)
    durations = [frame[0] for frame in read_gif(tmp_path / "a.gif")]
    assert len(durations) == 31 and set(durations[:-1]) == {30, 40} and sum(durations[:-1]) == 1000


def test_slow_gif_does_not_shorten_its_last_frame(tmp_path):
    write_gif(FRAMES, tmp_path / "a.gif", fps=0.5)
    assert [frame[0] for frame in read_gif(tmp_path / "a.gif")] == [2000] * 4


def test_mp4_is_read_back(tmp_path):
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


def test_mp4_of_a_real_image_is_near_it(tmp_path, images):
    image = images.image(0).convert("RGB").resize((64, 64))
    write_mp4([image], tmp_path / "a.mp4", fps=2)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 2
    assert np.abs(frames[0].astype(int) - np.asarray(image)).mean() < 4  # halved colour costs most of it


def test_suffix_picks_the_format(tmp_path):
    write_animation(FRAMES, tmp_path / "new" / "a.GIF", fps=4)
    write_animation(FRAMES, tmp_path / "a.mp4", fps=4)
    assert (tmp_path / "new" / "a.GIF").read_bytes()[:4] == b"GIF8"
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    with pytest.raises(ValueError, match=r"a\.webm must end in \.gif or \.mp4"):
        write_animation(FRAMES, tmp_path / "a.webm")


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 10, "at least one frame"),
        ([*FRAMES, solid((0, 0, 0), (8, 9))], 10, "frame 4 is 8x9 and frame 0 33x25"),
        (FRAMES, 0, "fps is 0, must be above 0"),
        (FRAMES, float("nan"), "fps is nan"),
    ],
)
def test_wrong_animations_leave_the_old_file(tmp_path, suffix, frames, fps, message):
    path = tmp_path / f"a{suffix}"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_animation(frames, path, fps)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_gif_has_a_highest_rate(tmp_path):
    with pytest.raises(ValueError, match="fps is 60, a GIF takes at most 50"):
        write_gif(FRAMES, tmp_path / "a.gif", fps=60)


def test_mp4_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV: pip install av"):
        write_mp4(FRAMES, tmp_path / "a.mp4")


# --- tables of images ---


def box(table: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom; all of the box must have it."""
    rows, columns = np.nonzero((np.asarray(table) == colour).all(axis=-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top), f"{colour} is not a whole rectangle"
    return left, top, right, bottom


def cells(sizes: list[list[tuple[int, int]]]) -> list[list[Image.Image]]:
    return [[solid((60 + 50 * i, 10 + 60 * j, 200), size) for j, size in enumerate(row)] for i, row in enumerate(sizes)]


def has_ink(table: Image.Image, area: tuple[int, int, int, int]) -> bool:
    return np.asarray(table.crop(area)).min() < 100


def test_cells_are_where_they_belong():
    rows = cells([[(40, 30)] * 3] * 2)
    table = labelled_grid(rows, ["up", "down"], ["a", "b", "c"])
    boxes = [[box(table, image.getpixel((0, 0))) for image in row] for row in rows]
    left, top = boxes[0][0][:2]
    gap = 6
    for i, row in enumerate(boxes):
        for j, found in enumerate(row):
            x, y = left + j * (40 + gap), top + i * (30 + gap)
            assert found == (x, y, x + 40, y + 30)
    assert table.size == (left + 3 * 46, top + 2 * 36)
    for j in range(3):  # each label in its column's stretch, above the images
        assert has_ink(table, (left + 46 * j, 0, left + 46 * j + 40, top))
    for i in range(2):
        assert has_ink(table, (0, top + 36 * i, left, top + 36 * i + 30))
    assert not has_ink(table, (0, 0, left, top))


def test_without_labels_there_is_no_room_for_them():
    rows = cells([[(40, 30)] * 2])
    assert labelled_grid(rows, [""], ["", ""]).size == (6 + 2 * 46, 6 + 36)
    assert labelled_grid(rows, ["row"], ["", ""]).height == 6 + 36


def test_rows_and_columns_fit_their_largest_image():
    rows = cells([[(20, 50), (40, 10)], [(30, 20), (10, 20)]])
    table = labelled_grid(rows, ["", ""], ["", ""])
    assert [box(table, image.getpixel((0, 0))) for row in rows for image in row] == [
        (6, 6, 26, 56),
        (42, 6, 82, 16),
        (6, 62, 36, 82),
        (42, 62, 52, 82),
    ]
    assert table.size == (88, 88)


def test_long_labels_are_wrapped_and_cut():
    """The longest label takes three lines and stays in its column, even one word that is wider than it."""
    short = labelled_grid(cells([[(60, 60)] * 2]), ["x"], ["one", "two"])
    rows = cells([[(60, 60)] * 2])
    text = "a photograph of a very small red apple on a table " * 5
    table = labelled_grid(rows, [text], [text, "Rindfleischetikettierung"])
    (left, top, _, bottom), (other, *_) = (box(table, image.getpixel((0, 0))) for image in rows[0])
    line = (top - box(short, (60, 10, 200))[1]) / 2  # two lines more than above `short`
    assert 14 <= line <= 24
    assert 100 < left <= 160 + 2 * 6
    assert not has_ink(table, (left + 60, 0, other, top)) and not has_ink(table, (other + 60, 0, table.width, top))
    assert has_ink(table, (left, 0, left + 60, top)) and has_ink(table, (other, 0, other + 60, top))
    assert not has_ink(table, (0, 0, left, top)) and bottom + 6 == table.height


def test_a_label_is_whole_beside_a_low_image():
    rows = cells([[(16, 4)], [(16, 4)]])
    table = labelled_grid(rows, ["first", "second"], [""])
    tops = [box(table, row[0].getpixel((0, 0)))[1] for row in rows]
    assert tops[1] - tops[0] >= 14 + 6  # a line of text and a gap


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "message"),
    [
        ([], [], [], "at least one image"),
        ([[]], ["a"], [], "at least one image"),
        ([FRAMES], ["a", "b"], ["1", "2", "3", "4"], "2 row labels for 1 rows"),
        ([FRAMES, FRAMES[:2]], ["a", "b"], ["1", "2", "3", "4"], "row 1 has 2 images for 4 column labels"),
    ],
)
def test_wrong_tables(rows, row_labels, column_labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, row_labels, column_labels)


# --- the forward process ---


def test_forward_strip_has_one_noise():
    schedule, clean = NoiseSchedule(), torch.randn(4, 8, 8)
    strip = forward_strip(schedule, clean, [0, 250, 999], torch.Generator().manual_seed(1))
    assert strip.shape == (3, 4, 8, 8)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Rombach et al. 2022
    for timestep, noisy in zip([0, 250, 999], strip, strict=True):
        abar = np.prod(1 - betas[: timestep + 1])
        torch.testing.assert_close(noisy, abar**0.5 * clean + (1 - abar) ** 0.5 * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("timesteps", "message"), [([], "empty"), ([3, 1000], "1000 is not one"), ([-1], "-1 is not")])
def test_wrong_timesteps(timesteps, message):
    with pytest.raises(ValueError, match=message):
        forward_strip(NoiseSchedule(), torch.zeros(4, 8, 8), timesteps, torch.Generator())


# --- previews ---


@pytest.fixture(scope="module")
def images() -> CaptionedImages:
    source = DataConfig(source="embedded", image_column="image", caption_column="text", size=16, limit=48)
    return open_images(source, 3, seed=0, progress=False)[0]


def test_preview_finds_a_linear_map():
    weights, bias = 0.2 * torch.randn(3, 4), 0.1 * torch.randn(3)
    latents = torch.randn(3, 4, 6, 8)
    colours = torch.einsum("oc,bchw->bohw", weights, latents) + bias[:, None, None]
    # Detail within a latent pixel that the average takes out again.
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(6, 8)
    preview = LatentPreview.fit(latents, F.interpolate(colours, scale_factor=2) + 0.3 * detail)
    torch.testing.assert_close(preview.weights, weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(preview.bias, bias, rtol=0, atol=1e-6)
    assert preview.factor == 2 and preview.r_squared == pytest.approx(1, abs=1e-9)


def test_r_squared_is_the_share_explained():
    """A colour that is half the latent's doing and half (orthogonal) noise: of equal variances, 0.5 is explained."""
    latent, noise = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    pixels = (0.4 * latent + 0.4 * noise).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    preview = LatentPreview.fit(latent.view(1, 1, 2, 2), pixels)
    assert preview.r_squared == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(preview.weights, torch.full((3, 1), 0.4))


def test_preview_images():
    weights, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0])
    preview = LatentPreview(weights, bias, factor=4, r_squared=1.0)
    latents = torch.tensor([[-1.0, 1.0], [0.2, 5.0]])[:, :, None, None].expand(2, 2, 3, 5)
    first, second = preview(latents)
    assert first.size == second.size == (20, 12)
    assert first.getcolors() == [(240, (0, 255, 255))]
    assert second.getcolors() == [(240, (153, 255, 255))]  # (0.2 + 1) * 127.5; 5 is clamped
    with pytest.raises(ValueError, match="latents have 3 channels, the preview takes 2"):
        preview(torch.zeros(1, 3, 4, 4))


def test_preview_file(tmp_path):
    preview = LatentPreview(torch.randn(3, 4), torch.randn(3), factor=8, r_squared=0.75)
    preview.save(tmp_path)
    again = LatentPreview.load(tmp_path)
    assert torch.equal(again.weights, preview.weights) and torch.equal(again.bias, preview.bias)
    assert (again.factor, again.r_squared) == (8, 0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a latent preview .KeyError: 'weights'"),
        ('{"weights": [[1], [2, 3], [4]], "bias": [0, 0, 0], "factor": 2, "r_squared": 1}', "is not a latent preview"),
        ('{"weights": [[1], [2]], "bias": [0, 0, 0], "factor": 2, "r_squared": 1}', r"weights \[3, C\]"),
        ('{"weights": [[1], [2], [3]], "bias": [0, 0, NaN], "factor": 2, "r_squared": 1}', "must hold finite"),
        ('{"weights": [[1], [2], [3]], "bias": [0, 0, 0], "factor": 0, "r_squared": 1}', "factor of at least 1"),
    ],
)
def test_broken_preview_files(tmp_path, text, message):
    (tmp_path / "latent_preview.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LatentPreview.load(tmp_path)


def test_latents_and_pixels_that_do_not_fit():
    latents = torch.zeros(2, 4, 4, 4)
    for shape in [(2, 3, 10, 10), (2, 1, 8, 8), (1, 3, 8, 8), (2, 3, 2, 2), (2, 3, 8, 12)]:
        with pytest.raises(ValueError, match=r"do not fit latents \[2, 4, 4, 4\]"):
            LatentPreview.fit(latents, torch.zeros(shape))
    with pytest.raises(ValueError, match="one colour"):
        LatentPreview.fit(latents, torch.zeros(2, 3, 8, 8))


def test_preview_of_a_trained_autoencoder(vae_run: Path, images):
    vae = AutoencoderKL.from_pretrained(vae_run).train()
    preview = fit_preview(vae, (pixels for _, pixels in images.batches(16)))
    assert preview.factor == 2 and preview.weights.shape == (3, 4) and vae.training
    assert preview.r_squared > 0.3  # measured: 0.44 after six training steps, 0.81 for the demo's autoencoder

    pixels = images.first(48)
    with torch.no_grad():
        shown = torch.stack([to_pixels(image) for image in preview(vae.sample(vae.encode(pixels)))])
    assert shown.shape == pixels.shape
    wanted, found = (F.avg_pool2d(x, 2).movedim(1, 0).flatten(1) for x in (pixels, shown))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(wanted, found, strict=True)]
    assert min(correlations) > 0.4  # measured: 0.58, 0.76, 0.69
    with pytest.raises(ValueError, match="at least one batch"):
        fit_preview(vae, [])

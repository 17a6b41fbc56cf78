"""The commands that generate images: what they write is what the pipeline generates."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from latentdiff.commands.cli import main
from latentdiff.commands.sampling import write_animation, write_images
from latentdiff.figures.grids import image_grid
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.walks import interpolate, variations

SAMPLING = ["--num-inference-steps", "3", "--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def same(path: Path, expected: Image.Image) -> bool:
    with Image.open(path) as written:
        return np.array_equal(np.asarray(written), np.asarray(expected))


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


THREE_STEPS = {"num_inference_steps": 3, "progress": False}


def test_every_sampling_option_reaches_the_pipeline(
    pipeline: LatentDiffusionPipeline, folder: str, tmp_path: Path
) -> None:
    out = tmp_path / "a.png"
    given = ["--negative-prompt", "blue", "--guidance-scale", "4", "--guidance-rescale", "0.5", "--clip-skip", "1"]
    given += ["--guidance-interval", "0.5", "3", "--sampler", "dpm++2m", "--sigmas", "karras", "--batch-size", "1"]
    main(["generate", folder, "a red apple", "--seed", "5", "--width", "24", "--out", str(out), *given, *SAMPLING])
    expected = pipeline(
        "a red apple",
        seed=5,
        width=24,
        negative_prompt="blue",
        guidance_scale=4.0,
        guidance_rescale=0.5,
        guidance_interval=(0.5, 3.0),
        clip_skip=1,
        sampler="dpm++2m",
        sigmas="karras",
        **THREE_STEPS,
    )
    assert same(out, expected[0])
    main(["generate", folder, "a", "--seed", "5", "--eta", "0.7", "--out", str(out), "--overwrite", *SAMPLING])
    assert same(out, pipeline("a", seed=5, eta=0.7, **THREE_STEPS)[0])


def test_image_to_image_changes_it(pipeline: LatentDiffusionPipeline, folder: str, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    command = ["image-to-image", folder, "a boat", "--image", str(image), "--strength", "0.6", "--seed", "2"]
    main([*command, "--out", str(out), *SAMPLING])
    expected = pipeline.image_to_image("a boat", Image.open(image), 0.6, seed=2, **THREE_STEPS)
    assert same(out, expected[0])


def test_inpaint_repaints_the_mask(
    pipeline: LatentDiffusionPipeline, folder: str, image: Path, mask: Path, tmp_path: Path
) -> None:
    out, film = tmp_path / "a.png", tmp_path / "a.gif"
    command = ["inpaint", folder, "a boat", "--image", str(image), "--mask", str(mask), "--seed", "2"]
    main([*command, "--out", str(out), "--animation", str(film), *SAMPLING])
    expected = pipeline.inpaint("a boat", Image.open(image), Image.open(mask), seed=2, **THREE_STEPS)
    assert same(out, expected[0])
    with Image.open(film) as frames:
        assert frames.n_frames == 3


def test_interpolate_writes_all(pipeline: LatentDiffusionPipeline, folder: str, tmp_path: Path) -> None:
    out, film = tmp_path / "a.png", tmp_path / "a.gif"
    command = ["interpolate", folder, "a boat", "an apple", "--seeds", "3", "4", "--frames", "4"]
    main([*command, "--out", str(out), "--animation", str(film), *SAMPLING])
    expected = interpolate(pipeline, ("a boat", "an apple"), (3, 4), 4, **THREE_STEPS)
    for i in range(4):
        assert same(tmp_path / f"a-{i}.png", expected[i])
    with Image.open(film) as frames:
        assert frames.n_frames == 4


def test_variations_are_the_pipelines(pipeline: LatentDiffusionPipeline, folder: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a.png"
    command = [
        "variations",
        folder,
        "a boat",
        "--amount",
        "0.2",
        "--num-images-per-prompt",
        "2",
        "--out",
        str(out),
        *SAMPLING,
    ]
    main([*command, "--seed", "3"])
    expected = variations(pipeline, "a boat", 3, 2, 0.2, **THREE_STEPS)
    assert same(tmp_path / "a-0.png", expected[0]) and same(tmp_path / "a-1.png", expected[1])
    assert "--seed is missing" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("option", "values", "change"),
    [
        ("guidance-scale", ["1", "4"], lambda value: {"guidance_scale": float(value)}),
        ("num-inference-steps", ["2", "3"], lambda value: {"num_inference_steps": int(value)}),
        ("sampler", ["ddpm", "heun"], lambda value: {"sampler": value}),
        ("seed", ["8", "9"], lambda value: {"seed": [int(value)] * 2}),
    ],
)
def test_grid_has_every_image(
    option: str,
    values: list[str],
    change: Callable[[str], dict],
    pipeline: LatentDiffusionPipeline,
    folder: str,
    tmp_path: Path,
) -> None:
    """Each cell is the image of its prompt and value, enlarged eight times to 128 pixels."""
    out = tmp_path / "grid.png"
    command = ["grid", folder, "a boat", "an apple", "--columns", option, "--values", *values, "--seed", "6"]
    main([*command, "--out", str(out), *SAMPLING])
    grid = Image.open(out).convert("RGB")
    for value in values:
        options = {"seed": [6, 6]} | THREE_STEPS | change(value)
        for image in pipeline(["a boat", "an apple"], **options):
            wanted = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC))
            # anywhere in the table
            assert _contains(np.asarray(grid), wanted), (option, value)


def _contains(table: np.ndarray, image: np.ndarray) -> bool:
    height, width = image.shape[:2]
    corners = np.argwhere((table == image[0, 0]).all(-1))
    return any(
        (table[y : y + height, x : x + width].shape == image.shape)
        and (table[y : y + height, x : x + width] == image).all()
        for y, x in corners
    )


def test_animation_shows_each_estimate(pipeline: LatentDiffusionPipeline, folder: str, tmp_path: Path) -> None:
    out, film = tmp_path / "a.png", tmp_path / "a.gif"
    main(["generate", folder, "a", "b", "--seed", "1", "--out", str(out), "--animation", str(film), *SAMPLING])
    estimates: list = []
    output = pipeline(
        ["a", "b"], seed=1, callback=lambda step, t, x, x0: estimates.append(pipeline.decode(x0)), **THREE_STEPS
    )
    with Image.open(film) as frames:
        assert frames.n_frames == 3
        for i, expected in enumerate([*estimates[:-1], output.images]):
            frames.seek(i)
            shown, wanted = frames.convert("RGB"), image_grid(expected)
            assert shown.size == wanted.size
            assert np.abs(np.asarray(shown).astype(int) - np.asarray(wanted)).mean() < 12  # 256 colours


@pytest.mark.runs
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "F", "a", "--animation", "a.webm"], "--animation a.webm must end in .gif or .mp4\n"),
        (["image-to-image", "F", "a", "--image", "none.png"], "--image none.png is not a readable image: "),
        (["image-to-image", "F", "a", "--image", "I", "--strength", "2"], "strength is 2.0, must be in 0 .. 1\n"),
        (["inpaint", "F", "a", "--image", "I", "--mask", "none.png"], "--mask none.png is not a readable image: "),
        (["grid", "F", "a"], "--values is missing, must be the values of guidance-scale, one per column\n"),
        (["grid", "F", "a", "--values", "x"], "--values of guidance-scale: could not convert string to float: 'x'\n"),
        (["grid", "F", "a", "--columns", "sampler", "--values", "eule"], "unknown sampler 'eule', must be one of ddpm"),
        (
            ["forward-process", "F", "--image", "I", "--timesteps", "1000"],
            "--timesteps has 1000, must be in 0 .. 999",
        ),
        (["generate", "F", "a", "--animate", "noisy"], "--animate noisy needs --animation FILE\n"),
        (["generate", "F", "a", "--animation", "a.gif", "--batch-size", "1"], "--animation shows all images at once"),
        (["generate", "F", "a", "--out", "I/a.png"], "image.png is not a folder\n"),
        (["grid", "F", "a", "--columns", "sampler", "--values", "ddim", "eule"], "unknown sampler 'eule'"),
    ],
)
def test_wrong_input_is_one_line(
    command: list[str], message: str, folder: str, image: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    error = refusal(capsys, *[{"F": folder, "I": str(image), "I/a.png": f"{image}/a.png"}.get(p, p) for p in command])
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def test_cancelling_leaves_nothing_half_written(folder: str, tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C while sampling, and while the second image is encoded."""
    from latentdiff.models.unet import UNet

    calls = []
    forward = UNet.forward

    def interrupted(self: UNet, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(UNet, "forward", interrupted)
        main(["generate", folder, "a", "b", "--out", str(tmp_path / "a.png"), *SAMPLING])
    assert list(tmp_path.iterdir()) == []

    save = Image.Image.save
    saved = []

    def broken(self: Image.Image, file: object, *arguments: object, **options: object) -> None:
        saved.append(1)
        save(self, file, *arguments, **options)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Image.Image, "save", broken)
        main(["generate", folder, "a", "b", "--out", str(tmp_path / "a.png"), *SAMPLING])
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.png"]


def test_animation_is_written_atomically_by_its_suffix(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 200)]
    write_animation(frames, tmp_path / "new" / "a.GIF", overwrite=False)
    write_animation(frames, tmp_path / "a.mp4", overwrite=True)
    assert (tmp_path / "new" / "a.GIF").read_bytes()[:4] == b"GIF8"
    old = (tmp_path / "a.mp4").read_bytes()
    assert old[4:8] == b"ftyp"
    with pytest.raises(ValueError, match="frame 1 is 9x8"):
        write_animation([frames[0], Image.new("RGB", (9, 8))], tmp_path / "a.mp4", overwrite=True)
    assert (tmp_path / "a.mp4").read_bytes() == old
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.GIF", "a.mp4", "new"]


# --- files that are there ---


def colours(folder: Path) -> dict[str, int]:
    """The red of each PNG's first pixel."""
    return {
        path.name: Image.open(path).convert("RGB").getpixel((0, 0))[0] for path in folder.glob("*.png") if path.exists()
    }


def squares(*reds: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (red, 0, 0)) for red in reds]


@pytest.mark.parametrize(
    ("command", "written", "again"),
    [
        (["generate", "F", "a"], ["a.png"], ["a-2.png"]),
        (["generate", "F", "a", "b"], ["a-0.png", "a-1.png"], ["a-2-0.png", "a-2-1.png"]),
        (["image-to-image", "F", "a", "--image", "I"], ["a.png"], ["a-2.png"]),
        (["inpaint", "F", "a", "--image", "I", "--mask", "M"], ["a.png"], ["a-2.png"]),
        (["variations", "F", "a", "--seed", "1"], ["a.png"], ["a-2.png"]),
        (["interpolate", "F", "a", "b", "--frames", "2"], ["a-0.png", "a-1.png"], ["a-2-0.png", "a-2-1.png"]),
        (["grid", "F", "a", "--columns", "seed", "--values", "1"], ["a.png"], ["a-2.png"]),
        (["forward-process", "F", "--image", "I", "--timesteps", "0"], ["a.png"], ["a-2.png"]),
    ],
)
def test_every_command_numbers_what_it_writes(
    command: list[str],
    written: list[str],
    again: list[str],
    folder: str,
    image: Path,
    mask: Path,
    tmp_path: Path,
    capsys,
) -> None:
    places = {"F": folder, "I": str(image), "M": str(mask)}
    call = [places.get(part, part) for part in command] + ["--out", str(tmp_path / "out" / "a.png")]
    call += ["--device", "cpu"] if command[0] == "forward-process" else SAMPLING

    def printed() -> list[str]:
        return [Path(line.split(" (seed")[0]).name for line in capsys.readouterr().out.splitlines()]

    main(call)
    assert printed() == written
    first = {name: (tmp_path / "out" / name).read_bytes() for name in written}
    main(call)
    assert printed() == again
    assert {name: (tmp_path / "out" / name).read_bytes() for name in written} == first
    main([*call, "--overwrite"])
    assert printed() == written
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*written, *again])


def test_images_of_one_call_have_one_number(tmp_path: Path) -> None:
    """Even if only some of the names are taken; an animation is numbered by itself."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a-1.png")
    (tmp_path / "a-2-0.png").symlink_to(tmp_path / "nowhere")
    write_images(squares(10, 20), tmp_path / "a.png", overwrite=False)
    assert colours(tmp_path) == {"a-1.png": 0, "a-3-0.png": 10, "a-3-1.png": 20}
    assert (tmp_path / "a-2-0.png").is_symlink() and not (tmp_path / "nowhere").exists()
    for _ in range(2):
        write_animation(squares(10, 20), tmp_path / "a.gif", overwrite=False)
    assert {path.name for path in tmp_path.glob("*.gif")} == {"a.gif", "a-2.gif"}


def test_a_name_that_is_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """After the first image of two is written, someone else writes one under the name of the second."""
    from latentdiff.formats import files

    save = files.save_png

    def taking(image: Image.Image, path: Path) -> None:
        save(image, path)
        if (tmp_path / "a-0.png").exists() and not (tmp_path / "a-1.png").exists():
            squares(99)[0].save(tmp_path / "a-1.png")

    monkeypatch.setattr(files, "save_png", taking)
    write_images(squares(10, 20), tmp_path / "a.png", overwrite=False)
    assert colours(tmp_path) == {"a-0.png": 10, "a-1.png": 99, "a-1-2.png": 20}


@pytest.mark.parametrize("links", [True, False])
def test_writing_at_once_loses_no_image(links: bool, tmp_path: Path, monkeypatch) -> None:
    """Also on file systems without hard links, as those of many memory cards. Processes share no lock: here neither."""
    monkeypatch.setattr("latentdiff.formats.files.CHANGING_NAMES", nullcontext())
    if not links:

        def refused(*arguments: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refused)
    barrier = threading.Barrier(8)

    def write(red: int) -> None:
        barrier.wait()
        write_images(squares(red), tmp_path / "a.png", overwrite=False)

    writers = [threading.Thread(target=write, args=[red]) for red in range(1, 9)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = colours(tmp_path)
    assert sorted(found) == sorted(["a.png", *(f"a-{n}.png" for n in range(2, 9))])
    assert sorted(found.values()) == list(range(1, 9))
    assert len(list(tmp_path.iterdir())) == 8

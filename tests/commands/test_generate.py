"""`latentdiff generate`: the files it writes and what it refuses."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_line import refusal
from PIL import Image
from tiny import tiny_pipeline

from latentdiff.commands.cli import main
from latentdiff.formats.swap import remove


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_generate_writes_images(tmp_path, folder, capsys):
    out = tmp_path / "out" / "a.png"
    common = ["--num-inference-steps", "2", "--seed", "3", "--no-progress", "--device", "cpu"]
    main(["generate", folder, "a red apple", "--out", str(out), *common])
    assert capsys.readouterr().out == f"{out} (seed 3)\n"
    expected = tiny_pipeline()("a red apple", seed=3, num_inference_steps=2, progress=False).images[0]
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        said = json.loads(image.info["latentdiff"])
    assert said == json.loads(expected.info["latentdiff"])
    how = {"prompt": "a red apple", "negative_prompt": "", "seed": 3, "sampler": "ddim", "num_inference_steps": 2}
    assert {key: said[key] for key in how} == how and len(said["model"]) == 16 and said["guidance_scale"] == 7.5
    main(["generate", folder, "a", "b", "--num-images-per-prompt", "2", "--out", str(out), *common])
    assert capsys.readouterr().out == "".join(f"{out.with_name(f'a-{i}.png')} (seed {3 + i})\n" for i in range(4))
    assert sorted(path.name for path in out.parent.iterdir()) == ["a-0.png", "a-1.png", "a-2.png", "a-3.png", "a.png"]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.jpg"], "--out a.jpg must end in .png\n"),
        (["--sampler", "eule"], "unknown sampler 'eule', must be one of ddpm, ddim, euler"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0, must be "),
        (["--num-inference-steps", "0"], "steps is 0, must be in 1 .. 1000"),
        (["--height", "17"], "height is 17, must be a multiple of 4 up to 16384\n"),
        (["--num-images-per-prompt", "0"], "num_images_per_prompt is 0, must be at least 1\n"),
        (["--seed", "-1"], "seed -1 is not an integer in 0 .. 2**63 - 1\n"),
        (["--device", "nothing"], "--device nothing: "),
    ],
)
def test_generate_refuses(folder, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "generate", folder, "a red apple", "--no-progress", *arguments)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.runs
def test_missing_pipeline_is_one_line_and_no_traceback(tmp_path):
    """In a process of its own: the installed command does the same as `main`."""
    code = "import sys; from latentdiff.commands.cli import main; main(sys.argv[1:])"
    arguments = ["generate", str(tmp_path / "nowhere"), "a red apple", "--out", str(tmp_path / "a.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.runs
def test_generate_from_a_checkpoint_or_an_unfinished_run(unet_run, vae_run, tmp_path, capsys):
    """The averaged weights, which are those of the finished pipeline at the last step."""
    run = shutil.copytree(unet_run, tmp_path / "run")
    for part in ("model_index.json", "unet", "text_encoder"):
        remove(run / part)
    images = {}
    for name, model in (("whole", unet_run), ("run", run), ("step", run / "checkpoints" / "step_00000003")):
        main(["generate", str(model), "red apple", "--out", f"{tmp_path / name}.png", "--seed", "1", "--no-progress"])
        said = capsys.readouterr().err
        with Image.open(f"{tmp_path / name}.png") as image:
            images[name] = np.asarray(image)
    assert said.startswith("the averaged weights of step 3, from ")
    assert np.array_equal(images["run"], images["whole"]) and not np.array_equal(images["step"], images["whole"])
    assert "is a checkpoint of stage 1" in refusal(
        capsys, "generate", str(vae_run / "checkpoints" / "step_00000003"), "a", "--out", str(tmp_path / "a.png")
    )


def test_traceback_on_demand():
    with pytest.raises(ValueError, match="must end in .png"):
        main(["generate", "folder", "a", "--out", "a.jpg", "--traceback"])

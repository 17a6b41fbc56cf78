"""From a folder of images to a recipe, and to a trained model."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scripts import ENVIRONMENT, TINY_UNET, TINY_VAE

from latentdiff.commands.cli import main
from latentdiff.commands.new import name_of
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.evaluation.inspection import inspect, read_settings
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training import new_recipe
from latentdiff.training.plan import Speed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_set(count: int, size: int = 40, captions: bool = True, name: str = "My Pictures") -> Path:
    folder = Path(name)
    folder.mkdir()
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i:02d}.png")
        if captions:
            (folder / f"{i:02d}.txt").write_text(f"picture number {i}")
    return folder


def test_names_and_devices_are_checked_before_images_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert [name_of(source, None) for source in ("Fotos von mir.zip", "写真", "a_b/Été.tar", "...")] == [
        *("fotos-von-mir", "写真", "été", "mine")
    ]
    error = refusal(capsys, "train", "nothing", "--device", "gpu")
    assert error == "error: --device gpu: no such device, must be cpu, cuda, cuda:1, mps or xpu\n"


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 0.1 s; nothing else takes time."""
    monkeypatch.setattr(new_recipe, "measure", lambda *of: Speed(0.1, 0.1))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--no-progress"])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_recipe_fits_the_images_and_the_minutes(fixed_speed: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(30)
    main(["new", "My Pictures", "--minutes", "10", "--no-progress"])
    files = [Path("configs/my-pictures/vae.yaml"), Path("configs/my-pictures/unet.yaml")]
    text = capsys.readouterr().out
    assert all(str(file) in text for file in files) and "27 images: they are memorised" in text
    assert "or latentdiff train 'My Pictures' --name my-pictures\n" in text, "as a shell takes it"
    vae, unet = load_config(VAETrainingConfig, files[0]), load_config(UNetTrainingConfig, files[1])
    # 10 minutes, 9 of which are used, three tenths of these for stage 1, at 0.1 s a step. In stage 2 no image is
    # trained on more than 2,000 times.
    assert vae.train.steps == 1620 and unet.train.steps == 2000 and "about 6 min" in text
    assert vae.data.size == unet.data.size == 32, "the images have 40 px"
    assert vae.train.batch_size == 16 and unet.train.batch_size == 27, "no more than there are"
    assert (unet.vae, unet.output.folder) == (vae.output.folder, "saved/my-pictures") == (
        "saved/my-pictures-vae", "saved/my-pictures"
    )  # fmt: skip
    # The first prompts are those of held-out images, as training holds them out.
    found = inspect(read_settings("My Pictures", 32, None), progress=False)
    held_out = [row.captions[0] for row in found.rows if row.held_out]
    assert list(unet.validation.prompts[:3]) == held_out and len(set(unet.validation.prompts)) == 8
    assert unet.text.config is not None and unet.text.config["max_position_embeddings"] == 16
    # Nothing that follows from other keys is stated.
    given = yaml.safe_load(files[1].read_text())
    assert (
        not {"sample_size", "in_channels", "cross_attention_dim"} & {*given["model"]} and "holdout" not in given["data"]
    )


def test_images_without_captions(fixed_speed: None) -> None:
    write_set(12, captions=False)
    main(["new", "My Pictures", "--no-progress", "--name", "plain"])
    unet = load_config(UNetTrainingConfig, "configs/plain/unet.yaml")
    assert unet.data.captions == "none" and unet.validation.prompts == ("",) and unet.validation.guidance_scale == 1


def test_what_cannot_be_is_one_line(fixed_speed: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(12)
    for minutes in ("0", "-1", "nan", "inf"):
        error = refusal(capsys, "train", "My Pictures", "--minutes", minutes)
        assert error == f"error: --minutes is {minutes}, must be a finite number above 0\n"
    assert "should be greater than or equal to 1" in refusal(capsys, "train", "My Pictures", "--size", "0")
    assert "SOURCE is '', must be a folder" in refusal(capsys, "train", "")
    assert "--size is 50, must be a multiple of 16" in refusal(capsys, "new", "My Pictures", "--size", "50")
    assert "--name is '../x', must consist of" in refusal(capsys, "new", "My Pictures", "--name", "../x")
    assert "data.source './none' does not exist" in refusal(capsys, "new", "./none")
    Path("no pictures").mkdir()
    assert "`latentdiff inspect 'no pictures'` shows" in refusal(capsys, "new", "no pictures")
    assert not Path("configs").exists()
    main(["new", "My Pictures", "--no-progress", "--name", "one"])
    capsys.readouterr()
    assert "is there already and is not replaced" in refusal(capsys, "new", "My Pictures", "--name", "one")
    Path("saved/two").mkdir(parents=True)
    assert "saved/two is there already, of another recipe" in refusal(capsys, "new", "My Pictures", "--name", "two")
    write_set(1, name="single")
    assert "1 training image(s), must have at least 2" in refusal(capsys, "new", "single")
    write_set(4, name="other")
    error = refusal(capsys, "train", "other", "--name", "one")
    assert "is for the images of 'My Pictures', not 'other'; choose another --name" in error


def test_the_smallest_size(fixed_speed: None) -> None:
    write_set(12)
    main(["new", "My Pictures", "--no-progress", "--size", "16"])
    vae = load_config(VAETrainingConfig, "configs/my-pictures/vae.yaml")
    assert vae.data.size == vae.train.crop_size == 16


STAGE = """
import signal, time
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(number))
print("ready", flush=True)
while not stop:
    time.sleep(0.05)
time.sleep(1)
print("saved", flush=True)
"""
COMMAND = """
import sys
from latentdiff.commands.new import _run_and_wait
sys.exit(_run_and_wait([sys.executable, "-c", sys.argv[1]]))
"""


@pytest.mark.parametrize("ctrl_c", [True, False])
def test_a_stage_that_is_stopped_is_given_the_time_to_save(ctrl_c: bool) -> None:
    """Ctrl-C reaches both processes, `kill` only that of the command."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, STAGE],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        if ctrl_c:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        assert process.communicate(timeout=60)[0] == "saved\n" and process.returncode == 0
    finally:
        with suppress(ProcessLookupError):  # none of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_stage_that_was_killed_is_named(
    fixed_speed: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(12)
    monkeypatch.setattr("latentdiff.commands.new._run_and_wait", lambda words: -signal.SIGKILL)
    with pytest.raises(SystemExit) as end:
        main(["train", "My Pictures", "--no-progress"])
    assert end.value.code == 137
    assert capsys.readouterr().err == (
        "error: train-vae was ended by SIGKILL (is there enough memory?); "
        "the same command goes on from its newest checkpoint\n"
    )


@pytest.mark.runs
def test_both_stages_are_trained_and_a_second_start_finds_them_finished(capfd: pytest.CaptureFixture[str]) -> None:
    """With tiny configs that are there already: they are used as they are."""
    write_set(24, size=16)
    own = ["data.source=My Pictures", "data.holdout=0.1", "data.limit=null"]
    folder = Path("configs/my-pictures")
    folder.mkdir(parents=True)
    vae = load_config(VAETrainingConfig, TINY_VAE[0], [*TINY_VAE[1:], *own, "output.folder=saved/v"])
    (folder / "vae.yaml").write_text(to_yaml(vae))
    words = [*TINY_UNET[1:], *own, "vae=saved/v", "output.folder=saved/u"]
    values = yaml.safe_load(to_yaml(load_config(UNetTrainingConfig, TINY_UNET[0], words)))
    for key in ("sample_size", "in_channels", "out_channels"):
        del values["model"][key]
    (folder / "unet.yaml").write_text(yaml.safe_dump(values))
    main(["train", "My Pictures", "--no-progress"])
    text = capfd.readouterr().out
    assert "used as it is" in text and "$ latentdiff train-vae configs/my-pictures/vae.yaml" in text
    assert text.count("22 training images, 2 held out") == 2
    with pytest.raises(SystemExit):
        main(["train", "My Pictures", "--size", "128", "--no-progress"])
    error = capfd.readouterr().err
    assert error == f"error: {folder / 'vae.yaml'} is for images of 16 px, not --size 128; choose another --name\n"
    assert LatentDiffusionPipeline.from_pretrained("saved/u").unet.config.sample_size == 8
    main(["train", "My Pictures", "--no-progress"])
    text = capfd.readouterr().out
    assert "saved/v is finished" in text and "$" not in text
    assert "saved/u is finished\nnext: latentdiff generate saved/u " in text
    shutil.rmtree("saved/u")
    main(["train", "My Pictures", "--no-progress"])
    assert "saved/v is finished" in (text := capfd.readouterr().out) and "$ latentdiff train-unet" in text

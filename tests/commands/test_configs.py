"""The recipes of the package: listed, printed, copied; and a wheel that can train."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from scripts import ROOT, TINY_VAE

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_every_recipe_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dict(line.split(maxsplit=1) for line in output(capsys, "configs").splitlines())
    folders = {path.parent.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/**/unet.yaml")}
    assert {*lines} == folders
    assert lines["dreambooth-sd15"].startswith("DreamBooth (Ruiz et al. 2023) as a LoRA: ")
    assert lines["demo"].startswith("Stage 2 of the demo: a text-conditioned UNet on the latents of stage 1")


def test_a_recipe_is_copied_whole_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "configs", "emoji-styles", "--write", tmp_path / "mine")
    names = ["held_out.txt", "unet.yaml", "vae.yaml"]
    assert text.splitlines() == [str(tmp_path / "mine" / name) for name in names]
    for name in names:
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / "configs/emoji-styles" / name).read_bytes()
    (tmp_path / "mine" / "vae.yaml").unlink()
    (tmp_path / "mine" / "unet.yaml").write_text("mine")
    error = refusal(capsys, "configs", "emoji-styles", "--write", tmp_path / "mine")
    assert "unet.yaml exist already and are not replaced" in error and not (tmp_path / "mine" / "vae.yaml").exists()
    assert (tmp_path / "mine" / "unet.yaml").read_text() == "mine"


def test_what_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no recipe 'dome', must be one of demo, dreambooth-sd15, emoji-128," in refusal(
        capsys, "configs", "dome"
    )
    assert "--write is given, but no recipe" in refusal(capsys, "configs", "--write", tmp_path)
    for command in ("train-vae", "train-unet"):
        error = refusal(capsys, command, tmp_path / "none.yaml")
        assert error == f"error: config {tmp_path / 'none.yaml'} does not exist\n"
    folder = ROOT / "configs/demo"
    error = refusal(capsys, "train-vae", folder)
    assert error == f"error: config {folder} is a folder; give {folder / 'vae.yaml'} or {folder / 'unet.yaml'}\n"
    assert "is a folder; give a YAML file" in refusal(capsys, "train-vae", tmp_path)
    with pytest.raises(
        ValueError, match="^config configs/demo/x.yaml does not exist; `latentdiff configs demo --write"
    ):
        load_config(VAETrainingConfig, "configs/demo/x.yaml")
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "plan", "configs/demo")
    hint = "`latentdiff configs demo --write configs/demo` writes it"
    assert error == f"error: config configs/demo does not exist; {hint}\n"
    assert "give it to latentdiff train-unet" in refusal(capsys, "train-vae", ROOT / "configs/demo/unet.yaml")


@pytest.mark.slow
def test_a_wheel_trains(tmp_path: Path) -> None:
    """Built from a copy of the sources, installed where nothing of the sources can be found, with our packages."""
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith(("saved/", "docs/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", source], check=True
    )
    (wheel,) = (tmp_path / "wheels").glob("latentdiff-*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path, not a site folder: the editable install in it is not found.
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([environment / "bin" / "python", "-m", "pip", "-q", "install", "--no-deps", wheel], check=True)

    def run(*arguments: object) -> str:
        command = [environment / "bin" / "latentdiff", *map(str, arguments)]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "demo" in run("configs")
    run("configs", "demo", "--write", "configs/demo")
    config = load_config(UNetTrainingConfig, tmp_path / "configs/demo/unet.yaml")
    assert config == load_config(UNetTrainingConfig, ROOT / "configs/demo/unet.yaml")
    run("train-vae", "configs/demo/vae.yaml", *TINY_VAE[1:], "train.steps=2", "output.folder=saved/vae")
    assert (tmp_path / "saved/vae/diffusion_pytorch_model.safetensors").is_file()

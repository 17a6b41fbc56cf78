"""`latentdiff export`: what it writes, in which names, and that nothing wrong, half or in the way is left."""

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import refusal
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from single_files import contents_of, small_sd
from tiny import tiny_pipeline

import latentdiff.pipeline.export
from latentdiff.commands.cli import main
from latentdiff.commands.push import choose_files
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.models.initial_model import with_initial_model
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.single_file import write_single_file
from latentdiff.recipes import CONFIGS
from latentdiff.training.run_folder import refuse_foreign
from latentdiff.training.unet_model import start_from

PARTS = ["token ids", "text states", "UNet", "VAE encoder", "VAE decoder", "image (of 255)"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "sd1"
    small_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "sd1")


def parts_of(table: str) -> dict[str, str]:
    """The verdicts of the printed table, by part; the last line is the path."""
    return {line[:14].strip(): line.split()[-1] for line in table.splitlines()[1:-1]}


def test_single_file_and_back(folder: Path, capsys) -> None:
    main(["export", str(folder), "--format", "single-file"])
    path = folder.parent / "sd1.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    main(["export", str(path), "--format", "diffusers", "--out", str(folder.parent / "back")])
    back = contents_of(folder.parent / "back")
    assert "README.md" in back and {**back, "README.md": None} == {**contents_of(folder), "README.md": None}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["back", "sd1", "sd1.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("diffusers", "sd1-fp16-diffusers"), ("single-file", "sd1-fp16.safetensors")]
)
def test_verified(kind: str, name: str, folder: Path, capsys) -> None:
    main(["export", str(folder), "--format", kind, "--dtype", "fp16", "--verify"])
    printed, out = capsys.readouterr().out, folder.parent / name
    table, card = printed.partition(f"\n{out}\n")[::2]
    assert parts_of(f"{table}\n{out}\n") == dict.fromkeys(PARTS, "same")
    assert card == ("its model card is README.md: fill in its licence\n" if kind == "diffusers" else "")
    files = [out] if kind == "single-file" else list(out.rglob("*.safetensors"))
    weights = {key: t for file in files for key, t in load_file(file).items()}
    kept = {"betas", "alphas_cumprod"}  # and the other buffers of the schedule
    types = {key: t.dtype for key, t in weights.items() if "." in key}
    types.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    assert set(types.values()) == {torch.float16}
    assert kind == "diffusers" or kept <= {key for key, t in weights.items() if t.dtype == torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (
            ".input_blocks.1.1.transformer_blocks.0.attn1.to_q.",
            ".input_blocks.1.1.transformer_blocks.0.attn1.to_k.",
            "UNet",
        ),
        (".encoder.mid.attn_1.q.", ".encoder.mid.attn_1.k.", "VAE encoder"),
        (".layers.0.layer_norm1.", ".layers.0.layer_norm2.", "text states"),
    ],
)
def test_mismatch_is_found_and_nothing_is_left(
    first: str, second: str, wrong: str, folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors of one shape under each other's names: the file opens everywhere and is another model."""

    def swapped(source: Path, path: Path) -> None:
        write_single_file(source, path)
        tensors = load_file(path)
        names = [key for key in tensors if first in key]
        assert names
        for key in names:
            other = key.replace(first, second)
            tensors[key], tensors[other] = tensors[other], tensors[key]
        save_file(tensors, path)

    monkeypatch.setattr(latentdiff.pipeline.export, "write_single_file", swapped)
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), "--format", "single-file", "--verify"])
    assert end.value.code == 1
    verdicts = parts_of(printed := capsys.readouterr().out)
    assert verdicts[wrong] == "DIFFERENT" and verdicts["token ids"] == "same"
    assert printed.endswith("sd1.safetensors is not written\n")
    assert list(folder.parent.iterdir()) == [folder]


def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(source: Path, path: Path) -> None:
        write_single_file(source, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(latentdiff.pipeline.export, "write_single_file", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["export", str(folder), "--format", "single-file"])
    assert list(folder.parent.iterdir()) == [folder]


def test_refusals(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents_of(folder)
    export = ("export", str(folder), "--format")
    assert f"--out {folder} exists, delete it first" in refusal(capsys, *export, "diffusers", "--out", str(folder))
    (folder.parent / "sd1-diffusers").mkdir()
    assert "sd1-diffusers exists, delete it first" in refusal(capsys, *export, "diffusers")
    assert "--out a.bin must end in .safetensors" in refusal(capsys, *export, "single-file", "--out", "a.bin")
    assert "--step 3: " in refusal(capsys, *export, "diffusers", "--step", "3")
    (notes := folder.parent / "notes.py").write_text("x = 1")
    error = refusal(capsys, "export", str(notes), "--format", "diffusers")
    assert error == f"error: {notes} is no .safetensors file, and no folder\n"
    assert "--raw is for a run with checkpoints, which " in refusal(capsys, *export, "diffusers", "--raw")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    error = refusal(capsys, *export, "single-file", "--verify")
    assert error == 'error: verifying needs diffusers: pip install "latentdiff[export]"\n'
    assert contents_of(folder) == before


def test_models_that_no_single_file_names(tmp_path: Path, capsys) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    error = refusal(capsys, "export", str(tmp_path / "tiny"), "--format", "single-file")
    assert "no single file names this model: it has [2, 2] attention heads" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_other_commands_take_a_single_file(saved: Path, tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "a.png"
    main(["export", str(saved), "--format", "single-file", "--out", str(path)])
    options = ["--seed", "3", "--num-inference-steps", "2", "--no-progress", "--device", "cpu"]
    main(["generate", str(path), "a red apple", "--out", str(out), *options])
    main(["generate", str(saved), "a red apple", "--out", str(tmp_path / "b.png"), *options])
    assert out.read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    main(["info", str(path)])
    printed = capsys.readouterr().out
    unet = sum(p.numel() for p in LatentDiffusionPipeline.from_pretrained(saved).unet.parameters())
    assert printed.startswith(f"{path}: single file of the structure of Stable Diffusion 1\n")
    assert f"{unet:,} parameters\n" in printed and "epsilon" in printed and "32x32" in printed
    error = refusal(capsys, "generate", str(saved), "a", "--prediction-type", "epsilon", "--out", str(out))
    assert f"--prediction-type epsilon is for single files; {saved} says itself what it is" in error
    error = refusal(capsys, "generate", str(tmp_path / "a.png"), "a", "--out", str(out))
    assert "a.png is no .safetensors file, and no folder" in error


@pytest.mark.runs
def test_checkpoints_of_a_run(unet_run: Path, tmp_path: Path, capsys) -> None:
    def exported(name: str, *options: str) -> dict[str, Any]:
        main(["export", str(unet_run), "--format", "diffusers", "--out", str(tmp_path / name), *options])
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")

    def saved_in(step: int, name: str) -> dict[str, Any]:
        tensors = load_file(unet_run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")
        return {key.removeprefix("unet."): t for key, t in tensors.items() if key.startswith("unet.")}

    published = load_file(unet_run / "unet" / "diffusion_pytorch_model.safetensors")
    for own, wanted in (
        (exported("published"), published),
        (exported("ema", "--ema"), saved_in(6, "ema")),
        (exported("step", "--step", "3"), saved_in(3, "ema")),
        (exported("raw", "--step", "3", "--raw"), saved_in(3, "model")),
    ):
        assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in own)
    assert not torch.equal(saved_in(3, "ema")["conv_in.weight"], saved_in(3, "model")["conv_in.weight"])
    capsys.readouterr()
    error = refusal(capsys, "export", str(unet_run), "--format", "diffusers", "--step", "5")
    assert f"--step 5: {unet_run} has the checkpoints of 3, 6" in error
    checkpoint = unet_run / "checkpoints" / "step_00000003"
    error = refusal(
        capsys, "export", str(checkpoint), "--format", "single-file", "--out", str(tmp_path / "a.safetensors")
    )
    assert "no single file names this model: " in error and not (tmp_path / "a.safetensors").exists()


@pytest.mark.runs
def test_card_of_a_run(unet_run: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(unet_run, tmp_path / "run")
    own = (run / "README.md").read_text()

    def card(name: str, *options: str) -> str:
        main(["export", str(run), "--format", "diffusers", "--out", str(tmp_path / name), *options])
        assert capsys.readouterr().out == f"{tmp_path / name}\nits model card is README.md: fill in its licence\n"
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert config["vae"] == "vae" and config["train"] == yaml.safe_load((run / "config.yaml").read_text())["train"]
        return (tmp_path / name / "README.md").read_text()

    # The published model: the run's card under the new name, without the comment that lets it be replaced.
    mine = card("mine")
    expected = own.partition("\n<!-- latentdiff-card")[0].replace("# run\n", "# mine\n").replace("'run'", "'mine'")
    assert mine == expected.replace("# demo\n", "# mine\n").replace("'demo'", "'mine'")
    assert ModelCard(mine, ignore_metadata_errors=False).data.to_dict()["pipeline_tag"] == "text-to-image"
    grid = "samples/step_00000006.png"
    assert f"({grid})" in mine and (tmp_path / "mine" / grid).read_bytes() == (run / grid).read_bytes()
    assert " rounded to float16. Their validation loss is " in card("half", "--dtype", "fp16")
    # Checkpoints: their own samples and figures, also of a run whose card is gone.
    (run / "README.md").unlink()
    step = card("step", "--step", "3")
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["validation/loss"] for line in losses if line["step"] == 3 and "validation/loss" in line)
    assert f"The weights are the averages (EMA) of step 3 of 6. Their validation loss is {loss:.4g}" in step
    assert "embedded, 20 training images, 4 held out; fingerprint `" in step and f"torch {version('torch')}" in step
    assert "samples/step_00000003.png" in step and (tmp_path / "step" / "samples" / "step_00000003.png").is_file()
    raw = card("raw", "--step", "3", "--raw")
    assert "The weights are the trained ones, not averaged, of step 3 of 6.\n" in raw
    assert "At step 3, drawn with the averages (EMA) of the training, not with these weights, row by row" in raw
    # One that somebody has edited is for them to change.
    (run / "README.md").write_text(edited := own.replace("license: unknown", "license: mit"))
    main(["export", str(run), "--format", "diffusers", "--out", str(tmp_path / "edited")])
    assert capsys.readouterr().out == f"{tmp_path / 'edited'}\nits model card is README.md\n"
    assert (tmp_path / "edited" / "README.md").read_text() == edited and (tmp_path / "edited" / grid).is_file()
    # What has a card and a config is shared, opened and exported again, but nothing is trained into it.
    main(["info", str(tmp_path / "mine")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'mine'}: text-to-image pipeline\n")
    assert {"README.md", "config.yaml", grid} <= {upload.name for upload in choose_files(tmp_path / "mine")}
    main(["export", str(tmp_path / "mine"), "--format", "diffusers", "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "README.md").read_text() == mine
    with pytest.raises(ValueError, match="mine holds a model that was not trained there"):
        refuse_foreign(tmp_path / "mine", load_config(UNetTrainingConfig, run / "config.yaml"))


def test_card_of_a_model_from_elsewhere(folder: Path, tmp_path: Path, capsys) -> None:
    def card(source: Path, name: str) -> str:
        main(["export", str(source), "--format", "diffusers", "--dtype", "bf16", "--out", str(tmp_path / name)])
        return (tmp_path / name / "README.md").read_text()

    text = card(folder, "plain")
    assert "sd1, written with latentdiff, with weights rounded to bfloat16. Its licence holds here too." in text
    assert str(tmp_path) not in text and "StableDiffusionPipeline.from_pretrained('plain')" in text
    header = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert header["license"] == "unknown" and header["library_name"] == "diffusers"
    unet = sum(p.numel() for p in LatentDiffusionPipeline.from_pretrained(folder).unet.parameters())
    assert f"| UNet | {unet:,} | predicts epsilon |" in text
    (folder / "a b.png").write_bytes(b"png")
    (folder / "README.md").write_text(
        theirs := "---\nlicense: mit\n---\n![x](a%20b.png) ![y](../../z.png) ![z](no.png)"
    )
    assert card(folder, "theirs") == theirs and (tmp_path / "theirs" / "a b.png").read_bytes() == b"png"


def test_training_starts_from_a_single_file(saved: Path, tmp_path: Path) -> None:
    source, random = LatentDiffusionPipeline.from_pretrained(saved), small_sd(seed=1)
    source.save_single_file(tmp_path / "a.safetensors")
    values = yaml.safe_load((CONFIGS / "demo" / "unet.yaml").read_text())
    del values["model"], values["diffusion"]
    values |= {"init_from": f"{tmp_path}/a.safetensors", "text": {"config": {}}}
    config = UNetTrainingConfig.model_validate(with_initial_model(values))
    assert config.diffusion == source.schedule and config.text.pad_token == "<|endoftext|>"
    start_from(config, source.vae, random.unet, random.text_encoder)
    for part in ("unet", "text_encoder"):
        own, wanted = getattr(random, part).state_dict(), getattr(source, part).state_dict()
        assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in own)

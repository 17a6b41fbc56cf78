"""`latentdiff info`: what it says of everything that the project writes, and that nothing hostile makes it long."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refusal
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_vae

from latentdiff.commands.cli import main
from latentdiff.formats.swap import remove
from latentdiff.pipeline import LatentDiffusionPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def said(capsys: pytest.CaptureFixture, path: Path) -> tuple[str, dict[str, str]]:
    """The title and the facts that the command prints of a path."""
    main(["info", str(path)])
    first, *lines = capsys.readouterr().out.splitlines()
    facts = {}
    for line in lines:
        name, value = line.strip().split("  ", 1)
        facts[name] = value.strip()
    assert first.startswith(f"{path}: ") or len(str(path)) > 100
    return first.partition(": ")[2], facts


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, float32"


def test_pipeline(capsys, folder: Path, pipeline: LatentDiffusionPipeline) -> None:
    title, facts = said(capsys, folder)
    assert title == "text-to-image pipeline"
    assert facts == {
        "images": "16 x 16 pixels",
        "latents": "4 channels, 1/2 of the image's sides",
        "scaling factor": "0.7",
        "text": "2 layers of width 16",
        "predicts": "epsilon",
        "sampler": "DDIMScheduler",
        "by default": "50 steps, guidance 7.5",
        "UNet": parameters(pipeline.unet),
        "text encoder": parameters(pipeline.text_encoder),
        "autoencoder": parameters(pipeline.vae),
    }


def test_folders_of_diffusers(capsys, folder: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(folder, tmp_path / "sd")
    (theirs / "generation_config.json").unlink()
    (theirs / "unet" / "diffusion_pytorch_model.safetensors").rename(
        theirs / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    title, facts = said(capsys, theirs)
    assert title == "diffusers folder of a StableDiffusionPipeline" and facts["UNet"].endswith(" parameters, float32")
    (theirs / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    title, facts = said(capsys, theirs)
    assert title == "diffusers folder of a StableDiffusionXLPipeline"
    assert facts == {"opens": "not with latentdiff, which reads Stable Diffusion 1 and 2"}
    assert said(capsys, folder / "unet")[0] == "model UNet2DConditionModel"
    assert said(capsys, folder / "text_encoder")[0] == "model CLIPTextModel"


def test_autoencoder(capsys, tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    title, facts = said(capsys, tmp_path)
    assert title == "autoencoder (AutoencoderKL)"
    assert facts == {
        "images": "16 x 16 pixels",
        "latents": "4 channels, 1/2 of the image's sides",
        "scaling factor": "0.7",
        "weights": parameters(vae),
    }


def test_tensors(capsys, tmp_path: Path) -> None:
    """Integers are no parameters."""
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7), "c": torch.arange(100)}
    save_file(tensors, path, {"format": "pt", "trained\x1b[2J by": "someone\nelse"})
    title, facts = said(capsys, path)
    assert title == "tensors (safetensors)"
    assert facts["tensors"] == "3" and facts["parameters"] == "22" and facts["types"] == "int64, bfloat16, float32"
    assert facts["metadata 'trained\\x1b[2J by'"] == "'someone\\nelse'"


def test_generated_image(capsys, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    options = ["--num-inference-steps", "2", "--seed", "3", "--no-progress", "--device", "cpu"]
    main(["generate", str(folder), "a red | apple\n\x1b[31m", "--out", str(out), *options])
    capsys.readouterr()
    title, facts = said(capsys, out)
    assert title == "image of 16 x 16 pixels, generated with latentdiff"
    expected = {"prompt": "a red | apple \\x1b[31m", "seed": "3", "sampler": "ddim", "num_inference_steps": "2"}
    assert {name: facts[name] for name in expected} == expected
    Image.new("RGB", (3, 2)).save(out)
    assert said(capsys, out) == ("PNG of 3 x 2 pixels that doesn't say how it was made", {})


def test_configs(capsys) -> None:
    title, facts = said(capsys, ROOT / "configs" / "demo" / "unet.yaml")
    assert title == "config of stage 2 (latentdiff train-unet)"
    expected = {"recipe": "demo", "autoencoder": "saved/demo-vae", "image size": "64", "widths": "[64, 128, 192]"}
    assert {name: facts[name] for name in expected} == expected
    assert said(capsys, ROOT / "configs" / "demo" / "vae.yaml")[0] == "config of stage 1 (latentdiff train-vae)"


@pytest.mark.runs
def test_runs_and_checkpoints(capsys, unet_run: Path, vae_run: Path, tmp_path: Path) -> None:
    title, facts = said(capsys, unet_run)
    assert title == "run of stage 2 (latentdiff train-unet)" and facts["model"] == "text-to-image pipeline"
    assert facts["state"] == "finished" and facts["newest checkpoint"] == "step 6 of 6" and facts["data"] == "embedded"
    loss = [json.loads(line) for line in (unet_run / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation/loss"] for line in loss if "validation/loss" in line][-1]
    assert facts["validation"] == f"validation/loss {last:.4g} at step 6"
    assert facts["published"] == "the weights of step 6"
    assert facts["images"] == "16 x 16 pixels" and facts["trained on"].startswith("captions of ")

    title, facts = said(capsys, vae_run)
    assert title == "run of stage 1 (latentdiff train-vae)" and facts["model"] == "autoencoder (AutoencoderKL)"
    title, facts = said(capsys, vae_run / "checkpoints" / "step_00000003")
    assert title == "checkpoint of stage 1 (latentdiff train-vae)" and facts["step"] == "3 of 6"

    run = tmp_path / "run"
    shutil.copytree(unet_run, run)
    for part in ("model_index.json", "unet", "checkpoints/step_00000006"):
        remove(run / part)
    facts = said(capsys, run)[1]
    assert facts["state"].startswith("not finished") and facts["newest checkpoint"] == "step 3 of 6"
    holder = {"process": os.getpid(), "host": os.uname().nodename, "since": "today"}
    (run / ".lock").write_text(json.dumps(holder))
    assert said(capsys, run)[1]["state"] == f"trains in process {os.getpid()} on {holder['host']} since today"
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (run / ".lock").write_text(json.dumps({**holder, "process": int(done.stdout)}))
    assert said(capsys, run)[1]["state"].startswith("not finished")


def hostile(tmp_path: Path) -> dict[str, Path]:
    """Things that can make a careless reader hang, crash, or print what is not one line."""
    paths = {
        name: tmp_path / name for name in ("fifo.png", "loop.yaml", "empty", "huge.safetensors", "deep", "big.yaml")
    }
    os.mkfifo(paths["fifo.png"])
    paths["loop.yaml"].symlink_to(paths["loop.yaml"])
    paths["empty"].mkdir()
    paths["huge.safetensors"].write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)
    paths["deep"].mkdir()
    (paths["deep"] / "config.json").write_text('{"a":' * 100_000)
    paths["big.yaml"].write_text("a: 1\n" * 100_000)
    paths["text.png"] = tmp_path / "text.png"
    paths["text.png"].write_text("no image")
    paths["list.yaml"] = tmp_path / "list.yaml"
    paths["list.yaml"].write_text("- 1\n- 2")
    paths["notes.txt"] = tmp_path / "a\n\x1b[31mred.txt"
    paths["notes.txt"].write_text("")
    paths["none"] = tmp_path / "none"
    paths["configs"] = tmp_path / "configs"
    paths["configs"].mkdir()
    (paths["configs"] / "unet.yaml").write_text("")
    paths["types"] = tmp_path / "types"
    paths["types"].mkdir()
    (paths["types"] / "manifest.json").write_text('{"config": [], "sha256": 1}')
    paths["pipe"] = tmp_path / "pipe"
    paths["pipe"].mkdir()
    os.mkfifo(paths["pipe"] / "model_index.json")
    return paths


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fifo.png", "fifo.png is no regular file"),
        ("loop.yaml", "loop.yaml is a link to nowhere, or to itself"),
        ("empty", "empty is no run, checkpoint, pipeline, model or LoRA"),
        ("huge.safetensors", "a header of 4,611,686,018,427,387,904 bytes in 108"),
        ("deep", "config.json is nested too deeply"),
        ("big.yaml", "big.yaml has 500,000 bytes, must have at most 200,000"),
        ("text.png", "text.png is not a readable PNG"),
        ("list.yaml", "list.yaml holds no sections, but [1, 2]"),
        ("notes.txt", "\\n\\x1b[31mred.txt' is no .safetensors, .png or .yaml"),
        ("none", "none does not exist"),
        (
            "configs",
            "configs is a folder of configs: give configs/unet.yaml, or see what they take with `latentdiff plan",
        ),
        ("types", "manifest.json is not the manifest of a checkpoint"),
        ("pipe", "model_index.json is no regular file"),
    ],
)
def test_anything_else_is_one_line(name: str, message: str, capsys, monkeypatch, tmp_path: Path) -> None:
    path = hostile(tmp_path)[name]
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "info", path.name)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and "\x1b" not in error


def test_values_of_any_type_and_length(capsys, tmp_path: Path) -> None:
    """In files that have the right names, and an image whose text is no JSON object."""
    wild = {"_class_name": "AutoencoderKL", "sample_size": "\x1b[2J", "block_out_channels": {}, "latent_channels": [[]]}
    (tmp_path / "config.json").write_text(json.dumps({**wild, "scaling_factor": 10**400}))
    title, facts = said(capsys, tmp_path)
    assert title == "autoencoder (AutoencoderKL)" and facts["scaling factor"] == "?"
    assert facts["weights"].startswith("unreadable: ") and facts["images"] == "? x ? pixels"
    aliases = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]\n" for i in range(30))
    (tmp_path / "a.yaml").write_text(f"{aliases}data: {{source: *a29}}\ntrain: [1]\noutput: 3\n")
    title, facts = said(capsys, tmp_path / "a.yaml")
    assert title == "config of stage 1 (latentdiff train-vae)" and len(facts["data"]) <= 1000
    for text in ("[1", "[" * 100_000, "[1]"):
        info = PngInfo()
        info.add_text("latentdiff", text)
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
        assert said(capsys, tmp_path / "a.png")[0].endswith("that doesn't say how it was made")
    info = PngInfo()
    info.add_text("latentdiff", json.dumps({"prompt": "x" * 100_000}))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert len(said(capsys, tmp_path / "a.png")[1]["prompt"]) <= 1000


def test_needs_no_torch(folder: Path) -> None:
    code = f"""
import contextlib, io, sys
from latentdiff.commands.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    for path in [{str(folder)!r}, {str(ROOT / "configs/demo/unet.yaml")!r}, {str(ROOT / "docs/images/apple.png")!r}]:
        main(["info", path])
print([name for name in ("torch", "transformers", "accelerate", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

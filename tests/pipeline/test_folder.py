"""Pipelines' folders as they are found: variants of some parts, further parts, and what is fetched from the hub."""

import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hostile_folders import copy_of
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from latentdiff.formats.files import write_json, write_text
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.options import GenerationDefaults
from latentdiff.pipeline.trained_on import TrainedOn

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_pipeline()
    pipeline.defaults = GenerationDefaults(num_inference_steps=7, guidance_scale=2.0)
    pipeline.trained_on = TrainedOn(captions=True, unconditional=True)
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    pipeline.save_pretrained(folder)
    return folder


def half(path: Path, target: Path) -> dict[str, torch.Tensor]:
    tensors = {key: value.half() for key, value in load_file(path).items()}
    save_file(tensors, target, {"format": "pt"})
    return tensors


def test_a_variant_of_some_parts(saved: Path, tmp_path: Path) -> None:
    """As in Stable Diffusion 1.5, whose `non_ema` variant only the UNet has."""
    folder = copy_of(saved, tmp_path / "copy")
    weights = half(folder / f"{UNET}.safetensors", folder / f"{UNET}.fp16.safetensors")
    expected = r"copy, vae and text_encoder have no variant 'fp16': their weights without a variant are read$"
    with pytest.warns(UserWarning, match=expected) as caught:
        opened = LatentDiffusionPipeline.from_pretrained(folder, dtype=None, variant="fp16")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert opened.unet.dtype == torch.float16 and opened.vae.dtype == torch.float32
    assert torch.equal(opened.unet.conv_in.weight, weights["conv_in.weight"])

    with pytest.raises(ValueError, match=r"no part of .*copy has the variant 'bf16': leave variant out$"):
        LatentDiffusionPipeline.from_pretrained(folder, variant="bf16")
    (folder / f"{UNET}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet/ has diffusion_pytorch_model.fp16.safetensors: pass variant='fp16'$"):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_further_parts_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    further = {"unet_ema": ["diffusers", "UNet2DConditionModel"], "safety_checker": ["stable_diffusion", "X"]}
    write_json(index | further, folder / "model_index.json")
    with pytest.warns(UserWarning, match=r"copy has further parts, which are not used: unet_ema$") as caught:
        LatentDiffusionPipeline.from_pretrained(folder)
    assert len(caught) == 1 and caught[0].filename == __file__


class Hub:
    """A repository of the hub, which copies the files that are asked for."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[str] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda api, name: self.names())

    def names(self) -> list[str]:
        files = sorted(path for path in self.repository.rglob("*") if path.is_file())
        return [path.relative_to(self.repository).as_posix() for path in files]

    def download(self, name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "someone/something"
        chosen = filter_repo_objects(self.names(), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.fetched = list(chosen)
        shutil.rmtree(self.cache, ignore_errors=True)
        for file in self.fetched:
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / file, self.cache / file)
        return str(self.cache)


def test_what_is_fetched_of_a_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that opening needs, its own defaults among it; no checkpoint, cache, report or pickle."""
    repository = copy_of(saved, tmp_path / "repository")
    own = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    step = "checkpoints/step_00000010"
    for name in (
        *(f"{step}/manifest.json", f"{step}/model.safetensors", f"{step}/unet/diffusion_pytorch_model.safetensors"),
        *("snapshots/step_00000010.safetensors", "latents/0.safetensors", "evaluation.json", "config.yaml"),
        *("safety_checker/config.json", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors"),
        *("vae/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "v1-5-pruned.safetensors", "README.md"),
    ):
        write_text("", repository / name)
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    opened = LatentDiffusionPipeline.from_pretrained("someone/something")
    assert set(hub.fetched) == own
    assert opened.defaults.num_inference_steps == 7 and opened.defaults.guidance_scale == 2.0
    assert opened.trained_on == TrainedOn(captions=True, unconditional=True)


@pytest.mark.parametrize("naming", ["today", "older"])
def test_shards_of_a_variant_are_fetched(
    naming: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both namings; of the parts without that variant, the weights without one."""
    repository = copy_of(saved, tmp_path / "repository")
    weights = half(repository / f"{UNET}.safetensors", repository / "whole.safetensors")
    shard, index = {
        "today": ("unet/diffusion_pytorch_model.fp16-0000{}-of-00002", "safetensors.index.fp16.json"),
        "older": ("unet/diffusion_pytorch_model-0000{}-of-00002.fp16", "safetensors.fp16.index.json"),
    }[naming]
    keys, weight_map = sorted(weights), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"{shard.format(number)}.safetensors"
        save_file({key: weights[key] for key in part}, repository / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, Path(name).name)
    write_json({"metadata": {}, "weight_map": weight_map}, repository / f"{UNET}.{index}")
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    with pytest.warns(UserWarning, match="vae and text_encoder have no variant 'fp16'"):
        opened = LatentDiffusionPipeline.from_pretrained("someone/something", dtype=None, variant="fp16")
    assert opened.unet.dtype == torch.float16
    assert all(torch.equal(value, weights[key]) for key, value in opened.unet.state_dict().items())
    fetched = {name for name in hub.fetched if name.endswith((".safetensors", ".index.json", ".fp16.json"))}
    assert fetched == {
        *(f"{shard.format(number)}.safetensors" for number in (1, 2)),
        f"{UNET}.{index}",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_nothing_is_said_of_a_folder_of_our_own(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LatentDiffusionPipeline.from_pretrained(saved)

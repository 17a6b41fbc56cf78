import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_files import EVERYWHERE, kohya, random_lora
from safetensors.torch import save_file
from tiny import normal, relative_error, tiny_pipeline
from torch import Tensor

from latentdiff.formats.lora import LORA_FILE, LoRA, write_lora
from latentdiff.pipeline import LatentDiffusionPipeline

OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
NOISE = normal(1, 4, 8, 8, seed=5)
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder; beside it two LoRAs of its own, and one from kohya's scripts."""
    folder = tmp_path_factory.mktemp("loras") / "base"
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder)
    for name, lora in (("one", random_lora(pipeline, *EVERYWHERE)), ("two", random_lora(pipeline, rank=3, seed=77))):
        (folder.parent / name).mkdir()
        write_lora(LoRA(lora.unet, lora.text_encoder, str(folder)), folder.parent / name / LORA_FILE)
    # Layers whose names diffusers reads from kohya's.
    save_file(
        kohya(random_lora(pipeline, "attn1.to_q", "attn2.to_out.0", "proj_in", "ff.net.0.proj", rank=4, alpha=2.0)),
        folder.parent / "kohya.v1.safetensors",
    )
    return folder


def latents(pipeline: LatentDiffusionPipeline) -> Tensor:
    return pipeline(PROMPT, latents=NOISE, progress=False, **OPTIONS).latents


@pytest.fixture(scope="module")
def theirs(base: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_latents(pipeline: StableDiffusionPipeline) -> Tensor:
    return pipeline(PROMPT, latents=NOISE, output_type="latent", **OPTIONS).images


def test_latents_are_those_of_diffusers(base: Path, theirs: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(base.parent / "one")  # the base, with it
    plain = latents(LatentDiffusionPipeline.from_pretrained(base))
    assert pipeline.adapters == {"one": 1.0}
    assert relative_error(latents(pipeline), plain) > 0.05
    assert pipeline.load_lora_weights(base.parent / "two", scale=0.0) == "two"
    for name in ("one", "two"):
        theirs.load_lora_weights(base.parent / name, adapter_name=name)
    for names, scales in ((["one"], [1.0]), (["one"], [0.5]), (["two", "one"], [0.7, -0.3])):
        pipeline.set_adapters(names, scales)
        theirs.set_adapters(names, scales)
        assert relative_error(latents(pipeline), their_latents(theirs)) < 2e-5
    assert pipeline.adapters == {"one": -0.3, "two": 0.7}
    unfused = latents(pipeline)

    with pytest.raises(ValueError, match=r"has the LoRA one, two: make it part of the weights with fuse_lora\(\)"):
        pipeline.save_pretrained(tmp_path / "no")
    with pytest.raises(ValueError, match="has the LoRA one, two"):
        pipeline.save_single_file(tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())

    pipeline.fuse_lora()
    assert pipeline.adapters == {}
    assert relative_error(latents(pipeline), unfused) < 2e-5
    pipeline.save_pretrained(tmp_path / "fused")
    assert relative_error(latents(LatentDiffusionPipeline.from_pretrained(tmp_path / "fused")), unfused) < 2e-5
    theirs.unload_lora_weights()


def test_kohya_file_gives_the_latents_of_diffusers(base: Path, theirs: StableDiffusionPipeline) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(base)
    plain = latents(pipeline)
    path = base.parent / "kohya.v1.safetensors"
    assert pipeline.load_lora_weights(path) == "kohya_v1"
    theirs.load_lora_weights(path)
    changed = latents(pipeline)
    assert relative_error(changed, plain) > 0.05
    assert relative_error(changed, their_latents(theirs)) < 2e-5
    theirs.unload_lora_weights()

    image = pipeline(PROMPT, seed=0, progress=False, **OPTIONS).images[0]
    assert json.loads(image.info["latentdiff"])["lora"] == {"kohya_v1": 1.0}
    again = pipeline.image_to_image(PROMPT, image, strength=0.7, seed=0, progress=False, **OPTIONS)
    pipeline.unload_lora_weights()
    assert relative_error(latents(pipeline), plain) < 2e-6
    without = pipeline.image_to_image(PROMPT, image, strength=0.7, seed=0, progress=False, **OPTIONS)
    assert relative_error(again.latents, without.latents) > 0.05
    assert "lora" not in json.loads(without.images[0].info["latentdiff"])


def test_names_and_scales(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(base)
    path = base.parent / "kohya.v1.safetensors"
    assert [pipeline.load_lora_weights(path) for _ in range(3)] == ["kohya_v1", "kohya_v1-2", "kohya_v1-3"]
    monkeypatch.chdir(base.parent / "one")
    assert pipeline.load_lora_weights(".", scale=0.5) == "one"
    # ModuleDicts, in which peft keeps them, have no room for names of their own methods.
    for name in ("train", "type"):
        link = base.parent / f"{name}.safetensors"
        link.symlink_to(path)
    assert [pipeline.load_lora_weights(base.parent / f"{name}.safetensors") for name in ("train", "type")] == [
        "lora",
        "lora-2",
    ]
    names = ("kohya_v1", "kohya_v1-2", "kohya_v1-3", "lora", "lora-2")
    assert pipeline.adapters == dict.fromkeys(names, 1.0) | {"one": 0.5}

    def refused(message: str, name: str = "x", **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            pipeline.load_lora_weights(path, name, **options)

    before = pipeline.adapters
    refused("there is an adapter one already", "one")
    refused("adapter_name 'a.b' must not be empty, contain a dot", "a.b")
    refused("adapter_name 'values' must not be empty, .* or be a word of torch's modules", "values")
    for scale in (float("nan"), float("inf"), True, "1"):
        refused("scale is .*, must be a number", scale=scale)
    with pytest.raises(
        ValueError, match=r"there is no adapter 'x': one, kohya_v1, kohya_v1-2, kohya_v1-3, lora, \.\.\."
    ):
        pipeline.set_adapters(["one", "x"])
    with pytest.raises(ValueError, match="there are 1 scales for 2 adapters"):
        pipeline.set_adapters(["one", "lora"], [1.0])
    assert pipeline.adapters == before
    pipeline.unload_lora_weights()
    for call in (pipeline.unload_lora_weights, pipeline.fuse_lora):
        with pytest.raises(ValueError, match="no LoRA is loaded"):
            call()


def test_folder_of_a_lora_opens_its_base(base: Path, tmp_path: Path) -> None:
    lora = random_lora(tiny_pipeline())
    with pytest.raises(ValueError, match="holds a LoRA that does not say of what model it is: open the model, then"):
        write_lora(lora, tmp_path / LORA_FILE)
        LatentDiffusionPipeline.from_pretrained(tmp_path)
    for itself in (tmp_path, base.parent / "one"):
        write_lora(LoRA(lora.unet, {}, str(itself)), tmp_path / LORA_FILE)
        with pytest.raises(ValueError, match="which is a LoRA itself, must be a model"):
            LatentDiffusionPipeline.from_pretrained(tmp_path)
    write_lora(LoRA(lora.unet, {}, "no/where"), tmp_path / LORA_FILE)
    with pytest.raises(
        ValueError, match="holds a LoRA, whose model cannot be opened: pipeline 'no/where' is no folder or file here"
    ):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lora", "compile"])
def test_compiled_blocks(first: str, base: Path) -> None:
    pipeline = LatentDiffusionPipeline.from_pretrained(base)
    if first == "compile":
        pipeline.compile("blocks", backend="aot_eager")
        latents(pipeline)
    pipeline.load_lora_weights(base.parent / "one")
    if first == "lora":
        pipeline.compile("blocks", backend="aot_eager")
    compiled = latents(pipeline)
    other = LatentDiffusionPipeline.from_pretrained(base.parent / "one")
    assert relative_error(compiled, latents(other)) < 1e-4
    for scale in (0.5, -1.0):
        pipeline.set_adapters("one", scale)
        other.set_adapters("one", scale)
        assert relative_error(latents(pipeline), latents(other)) < 1e-4
    plain = latents(LatentDiffusionPipeline.from_pretrained(base))
    pipeline.unload_lora_weights()
    assert relative_error(latents(pipeline), plain) < 1e-4


def test_a_lora_is_not_rounded_to_the_type_of_its_models_files(tmp_path: Path) -> None:
    """Of a model in float16, opened in float32 as it is by default."""
    pipeline, folder = tiny_pipeline(), tmp_path / "lora"
    folder.mkdir()
    lora = random_lora(pipeline)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "base")
    write_lora(LoRA(lora.unet, lora.text_encoder, str(tmp_path / "base")), folder / LORA_FILE)
    opened = dict(LatentDiffusionPipeline.from_pretrained(folder).unet.named_parameters())
    exact = dict(LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).unet.named_parameters())
    assert all(torch.equal(opened[name], value) for name, value in exact.items())
    assert any("lora_" in name and not torch.equal(value, value.half().float()) for name, value in exact.items())

"""LoRA adapters of a pipeline: loaded into its UNet and text encoder, scaled, stacked, fused and removed."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from latentdiff.formats.headers import yaml_mapping
from latentdiff.formats.lora import LORA_FILE, holds_lora, lora_base, lora_file, read_lora
from latentdiff.models.lora import adaptable_layers, adapter_scales, attach, detach, fuse, set_scales
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.printable import listed, shortened, shown

if TYPE_CHECKING:
    from latentdiff.pipeline.pipeline import LatentDiffusionPipeline


def networks(pipeline: "LatentDiffusionPipeline") -> tuple[nn.Module, ...]:
    """Those that can have adapters: the UNet and, if it is CLIP's, the text encoder."""
    text = pipeline.text_encoder
    return (pipeline.unet, text.model) if isinstance(text, TextEncoder) else (pipeline.unet,)


def scales_of(pipeline: "LatentDiffusionPipeline") -> dict[str, float]:
    """The scale of every adapter; 0 for those that are not active."""
    scales: dict[str, float] = {}
    for network in networks(pipeline):
        scales |= adapter_scales(network)
    return scales


def load(
    pipeline: "LatentDiffusionPipeline",
    name: str | Path,
    adapter_name: str | None,
    scale: float,
    weight_name: str | None,
) -> str:
    """Read a LoRA and attach it; returns the adapter's name. ValueError as `read_lora`, or if the name is taken."""
    _check_scale(scale)
    there = scales_of(pipeline)
    path = lora_file(name, weight_name)
    if adapter_name is None:
        adapter_name = _free_name(str(name), path, there)
    if adapter_name in there:
        raise ValueError(f"there is an adapter {shown(adapter_name)} already: choose another adapter_name")
    if not _can_name(adapter_name):
        raise ValueError(
            f"adapter_name {shortened(adapter_name)} must not be empty, contain a dot, or be a word of torch's modules"
        )
    unet, *texts = networks(pipeline)
    lora = read_lora(path, adaptable_layers(unet), adaptable_layers(texts[0]) if texts else {})
    attach(unet, adapter_name, lora.unet)
    for text in texts:
        attach(text, adapter_name, lora.text_encoder)
    _set(pipeline, {**there, adapter_name: scale})
    return adapter_name


def _free_name(name: str, path: Path, taken: Collection[str]) -> str:
    """What a LoRA is called if nobody says it: as its file, its folder or its repository, with a number if need be."""
    stem = path.stem
    if path.name == LORA_FILE:
        stem = path.parent.resolve().name if Path(name).expanduser().exists() else name.rpartition("/")[2]
    stem = stem.replace(".", "_")
    stem = stem if _can_name(stem) else "lora"
    numbered = (f"{stem}-{number}" for number in range(2, len(taken) + 3))
    return stem if stem not in taken else next(other for other in numbered if other not in taken)


def _can_name(adapter: str) -> bool:
    """Whether a ModuleDict, in which peft keeps the adapters, can have it under this name."""
    return bool(adapter) and "." not in adapter and not hasattr(nn.ModuleDict(), adapter)


def choose(pipeline: "LatentDiffusionPipeline", names: Sequence[str], scales: Sequence[float]) -> None:
    """Make these adapters act and no others; ValueError for an unknown name."""
    there = scales_of(pipeline)
    for name, scale in zip(names, scales, strict=True):
        _check_scale(scale)
        if name not in there:
            raise ValueError(f"there is no adapter {shortened(name)}: " + (listed(list(there)) or "none is loaded"))
    _set(pipeline, dict(zip(names, scales, strict=True)))


def fuse_all(pipeline: "LatentDiffusionPipeline") -> None:
    """Make what the active adapters change part of the weights; ValueError if there are none."""
    require_adapters(pipeline)
    for network in networks(pipeline):
        fuse(network)


def remove_all(pipeline: "LatentDiffusionPipeline") -> None:
    """Remove all adapters; ValueError if there are none."""
    require_adapters(pipeline)
    for network in networks(pipeline):
        detach(network)


def require_adapters(pipeline: "LatentDiffusionPipeline") -> None:
    """Raise ValueError if there are none."""
    if not scales_of(pipeline):
        raise ValueError("no LoRA is loaded: load_lora_weights(FILE) first")


def refuse_adapters(pipeline: "LatentDiffusionPipeline") -> None:
    """Raise ValueError if there are any, as a file of a model has no place for them."""
    if there := list(scales_of(pipeline)):
        raise ValueError(
            f"the pipeline has the LoRA {listed(there)}: make it part of the weights with fuse_lora(), or remove it "
            "with unload_lora_weights(), before saving"
        )


def base_of(folder: Path) -> str | None:
    """The model that the LoRA in a folder was trained on; None if the folder holds none, or a pipeline.

    A run's config says it with the path on this machine, the file itself without. Raises ValueError if neither does, or
    if the model is a LoRA too.
    """
    path = folder / LORA_FILE
    if not holds_lora(folder):
        return None
    config = folder / "config.yaml"
    base = yaml_mapping(config).get("init_from") if config.is_file() else None
    base = base if isinstance(base, str) else lora_base(path)
    if base is None:
        raise ValueError(
            f"{folder} holds a LoRA that does not say of what model it is: open the model, then "
            f"load_lora_weights({str(folder)!r})"
        )
    if holds_lora(Path(base).expanduser()):
        raise ValueError(f"{folder} holds a LoRA of {base}, which is a LoRA itself, must be a model")
    return base


def _set(pipeline: "LatentDiffusionPipeline", scales: Mapping[str, float]) -> None:
    for network in networks(pipeline):
        set_scales(network, scales)


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf"):
        raise ValueError(f"scale is {shortened(scale)}, must be a number; 1 is as trained")

"""LoRA files (Hu et al. 2021): small changes of some layers of a UNet and a text encoder.

Read: the layouts of diffusers, old and new, of peft, and of kohya's scripts, which A1111 and ComfyUI share. Written:
that of diffusers.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.formats.diffusers_folder import PIPELINE_FILE
from latentdiff.formats.files import (
    read_safetensors,
    read_safetensors_header,
    refuse_not_finite,
    write_safetensors,
)
from latentdiff.formats.headers import json_object, read_tensor_file
from latentdiff.formats.hub import hub_files, hub_snapshot
from latentdiff.printable import listed, shortened, shown, shown_path

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of it in a folder
BASE_KEY = "latentdiff.base_model"  # in the metadata: what it was trained on
_METADATA_KEY = "lora_adapter_metadata"  # diffusers' own
_PEFT_FILE, _PEFT_PREFIX = "adapter_config.json", "base_model.model."  # beside a file with such names
Part = Literal["unet", "text_encoder"]
Layers = Mapping[str, tuple[int, ...]]  # shapes of the weights that can change, by the layer's name

# How names end: peft, diffusers, diffusers' text encoders, kohya, and diffusers before 0.22 (attention processors).
_ENDINGS = {
    **{".lora_A.weight": "down", ".lora_B.weight": "up"},
    **{".lora_A.default.weight": "down", ".lora_B.default.weight": "up"},
    **{".lora.down.weight": "down", ".lora.up.weight": "up"},
    **{".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up"},
    **{".lora_down.weight": "down", ".lora_up.weight": "up"},
    **{"_lora.down.weight": "down", "_lora.up.weight": "up"},
    ".alpha": "alpha",
}
_PREFIXES: dict[str, Part] = {"unet.": "unet", "text_encoder.": "text_encoder", _PEFT_PREFIX: "unet"}
_KOHYA: dict[str, Part] = {"lora_unet_": "unet", "lora_te_": "text_encoder"}
# Diffusers before 0.18 gave the text encoder's layers the names of the UNet's.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_OTHER_MODELS = {
    **dict.fromkeys(("lora_te1_", "lora_te2_", "text_encoder_2."), "it is for Stable Diffusion XL"),
    **dict.fromkeys(
        ("lora_transformer_", "transformer."), "it is for a transformer, such as Stable Diffusion 3 or Flux"
    ),
    **dict.fromkeys(
        ("model.diffusion_model.", "cond_stage_model.", "first_stage_model."), "it is a whole model, not a LoRA"
    ),
}
_OTHER_KINDS = {
    **dict.fromkeys((".dora_scale", "lora_magnitude_vector"), "DoRA"),
    **{".hada_": "LoHa", ".lokr_": "LoKr", ".lora_mid": "Tucker decomposition (LoCon)", ".oft_": "OFT"},
}


@dataclass(frozen=True)
class LowRank:
    """The change of a layer's weight W [out, in, ...]: W + alpha / rank * up @ down (Hu et al. 2021, section 4.1).

    down: [rank, in], of a convolution [rank, in, kernel]; up: [out, rank], of a convolution [out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Of the product, at most."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LoRA:
    """The changes of a model, by the layer's name: diffusers' in a UNet, transformers' without `text_model.` in CLIP.

    base: the model it was trained on, a folder, file or hub id; None: not known.
    """

    unet: Mapping[str, LowRank]
    text_encoder: Mapping[str, LowRank]
    base: str | None = None


def lora_file(name: str | Path, weight_name: str | None = None) -> Path:
    """The LoRA's file: a file itself, that of a folder, or one of a hub repository.

    weight_name: which of several. Raises ValueError if there is none, or several and none of them is `LORA_FILE`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{shown_path(path)} is no .safetensors file, the only kind of LoRA that is read")
        return path
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        return path / _choice(files, weight_name, shown_path(path))
    there = hub_files(str(name))
    if there is None:
        wanted = weight_name or LORA_FILE  # perhaps it is in the cache
    else:
        files = sorted(file for file in there if file.endswith(".safetensors"))
        wanted = _choice(files, weight_name, f"the hub's {shortened(str(name))}")
    try:
        found = hub_snapshot(str(name), [wanted, _PEFT_FILE]) / wanted
    except ValueError as error:
        raise ValueError(
            f"LoRA {shortened(str(name))} is neither a file, nor a folder, nor could it be reached on the hub: {error}"
        ) from None
    if not found.is_file():
        raise ValueError(f"the hub's {shortened(str(name))} has no {wanted}")
    return found


def _choice(files: Collection[str], wanted: str | None, place: str) -> str:
    chosen = wanted or (LORA_FILE if LORA_FILE in files else next(iter(files), None))
    if chosen is None or chosen not in files:
        raise ValueError(f"{place} has no {shown(wanted) if wanted else 'LoRA (.safetensors)'}")
    if wanted is None and chosen != LORA_FILE and len(files) > 1:
        raise ValueError(f"{place} has several files: name one of {listed([shown(file) for file in files])}")
    return chosen


def holds_lora(folder: Path) -> bool:
    """Whether a LoRA is what a folder holds, and no pipeline."""
    return (folder / LORA_FILE).is_file() and not (folder / PIPELINE_FILE).is_file()


def lora_base(path: Path) -> str | None:
    """What the model was called that a LoRA was trained on, if its file says so. ValueError if it is no such file."""
    return read_tensor_file(path).metadata.get(BASE_KEY)


def read_lora(path: Path, unet: Layers, text_encoder: Layers) -> LoRA:
    """The changes in a file, for a model with these layers; in float32.

    Raises ValueError if the file is damaged, of another kind, or not whole; if it changes other layers, or ones of
    other sizes; or if a number is not finite.
    """
    place = shown_path(path)
    header = read_safetensors_header(path)
    layers: dict[Part, Layers] = {"unet": unet, "text_encoder": text_encoder}
    flat: dict[Part, dict[str, str]] = {
        part: {name.replace(".", "_"): name for name in own} for part, own in layers.items()
    }
    found: dict[Part, dict[str, dict[str, str]]] = {"unet": {}, "text_encoder": {}}
    for key in header:
        part, layer, half = _parsed(key, flat, place)
        if layer not in layers[part]:
            raise ValueError(
                f"{place} changes {shown(layer)}, which is no layer of this {_NAMES[part]}: it is for another model"
            )
        halves = found[part].setdefault(layer, {})
        if half in halves:
            raise ValueError(f"{place} has {shown(halves[half])} and {shown(key)}, which are the same")
        halves[half] = key
    if not header:
        raise ValueError(f"{place} has no tensors")
    metadata = read_tensor_file(path).metadata
    said = _said(path, metadata, header)
    for part, changes in found.items():
        for layer, halves in changes.items():
            _check_layer(layer, halves, header, layers[part][layer], place)
    tensors = read_safetensors(path, dtype=torch.float32)
    refuse_not_finite(tensors, place)
    unet_changes, text_changes = (
        {
            layer: _low_rank(layer, halves, tensors, layers[part][layer], said.get(part, {}))
            for layer, halves in found[part].items()
        }
        for part in ("unet", "text_encoder")
    )
    return LoRA(unet_changes, text_changes, metadata.get(BASE_KEY))


_NAMES: dict[Part, str] = {"unet": "UNet", "text_encoder": "text encoder"}


def _parsed(key: str, flat: Mapping[Part, Mapping[str, str]], place: str) -> tuple[Part, str, str]:
    """Part, layer and half (down, up or alpha) of a tensor's name. flat: the layers, by kohya's names of them."""
    for start, reason in _OTHER_MODELS.items():
        if key.startswith(start):
            raise ValueError(f"{place} cannot be used: {reason} (it has {shown(key)})")
    for piece, kind in _OTHER_KINDS.items():
        if piece in key:
            raise ValueError(f"{place} cannot be used: of the kinds of LoRA, {kind} is not supported ({shown(key)})")
    ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{place} is no LoRA of a known layout: it has {shown(key)}")
    half, name = _ENDINGS[ending], key.removesuffix(ending)
    for start, part in _KOHYA.items():
        if key.startswith(start):
            rest = name.removeprefix(start)
            if part == "text_encoder":
                rest = rest.removeprefix("text_model_")
            return part, flat[part].get(rest, rest), half
    part: Part = "unet"
    for start, kind in _PREFIXES.items():
        if key.startswith(start):
            part, name = kind, name.removeprefix(start)
    name = name.removeprefix("text_model.").replace(".processor.", ".")
    start, _, last = name.rpartition(".")
    if part == "text_encoder":
        return part, f"{start}.{_OLD_TEXT.get(last, last)}", half
    return part, f"{name}.0" if last == "to_out" else name, half


def _said(path: Path, metadata: Mapping[str, str], keys: Collection[str]) -> dict[Part, dict[str, Any]]:
    """Of each part, peft's LoraConfig: in diffusers' metadata, or in the file that peft writes beside its own."""
    place = f"{shown_path(path)}, metadata {_METADATA_KEY}"
    beside = path.with_name(_PEFT_FILE)
    if _METADATA_KEY in metadata:
        try:
            values = json.loads(metadata[_METADATA_KEY])
            assert isinstance(values, dict)
        except (ValueError, RecursionError, AssertionError):
            raise ValueError(f"{place}: must be a JSON object") from None
    elif any(key.startswith(_PEFT_PREFIX) for key in keys) and beside.is_file():
        place, values = shown_path(beside), json_object(beside)
    else:
        return {}
    said: dict[Part, dict[str, Any]] = {
        part: {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
        for part in ("unet", "text_encoder")
    }
    if not any(said.values()):  # a UNet wrote it by itself
        said["unet"] = values
    for own in said.values():
        if own.get("use_dora"):
            raise ValueError(f"{place}: of the kinds of LoRA, DoRA is not supported")
        patterns = own.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{place}: alpha_pattern is {shortened(patterns)}, must be a mapping")
        # peft takes names for regular expressions; all that diffusers makes of it is the start.
        patterns = {name.removeprefix("^").removeprefix("text_model."): alpha for name, alpha in patterns.items()}
        for name, alpha in {"lora_alpha": own.get("lora_alpha", 1), **patterns}.items():
            is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not is_number or not abs(alpha) <= torch.finfo(torch.float32).max:
                raise ValueError(f"{place}: {shown(name)} is {shortened(alpha)}, must be a number")
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(f"{place}: alpha_pattern has {shown(name)}, must be a layer's name")
        own["alpha_pattern"] = patterns
    return said


def _check_layer(
    layer: str, halves: Mapping[str, str], header: Mapping[str, Tensor], weight: tuple[int, ...], place: str
) -> None:
    if missing := [half for half in ("down", "up") if half not in halves]:
        raise ValueError(f"{place} is not whole: of {shown(layer)} it has no {' and no '.join(missing)} matrix")
    if any(not header[key].dtype.is_floating_point for half, key in halves.items() if half != "alpha"):
        raise ValueError(f"{place}: the matrices of {shown(layer)} are no floating-point numbers")
    down, up = (tuple(header[halves[half]].shape) for half in ("down", "up"))
    rank = down[0] if down else 0
    fits = (
        len(down) >= 2
        and rank > 0
        and down[1] == weight[1]
        and prod(down[1:]) == prod(weight[1:])
        and up[:2] == (weight[0], rank)
        and prod(up) == weight[0] * rank
    )
    if not fits:
        raise ValueError(
            f"{place} does not fit: of {shown(layer)}, whose weight is {list(weight)}, it has the matrices "
            f"{shortened(list(down))} and {shortened(list(up))}"
        )
    if "alpha" in halves and header[halves["alpha"]].numel() != 1:
        raise ValueError(f"{place}: {shown(halves['alpha'])} is not one number")


def _low_rank(
    layer: str,
    halves: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    weight: tuple[int, ...],
    said: Mapping[str, Any],
) -> LowRank:
    down, up = tensors[halves["down"]], tensors[halves["up"]]
    rank = down.shape[0]
    if "alpha" in halves:
        alpha = tensors[halves["alpha"]].item()
    else:
        patterns = said.get("alpha_pattern", {})
        own = [value for name, value in patterns.items() if f".{layer}".endswith(f".{name}")]
        alpha = float(own[0] if own else said.get("lora_alpha", rank))
        if said.get("use_rslora"):  # divided by the root of the rank (Kalajdzievski 2023)
            alpha *= rank**0.5
    if alpha == 0:  # no effect; the scale of an adapter is told by its alpha, which so must be another number
        alpha, up = float(rank), torch.zeros_like(up)
    ones = (1,) * (len(weight) - 2)
    return LowRank(down.reshape(rank, *weight[1:]), up.reshape(weight[0], rank, *ones), alpha)


def write_lora(lora: LoRA, path: Path) -> None:
    """Write diffusers' file, which every release with LoRA reads: alpha is the rank, the rest is in `up`.

    Raises ValueError if a number is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for layer, change in lora.unet.items():
        tensors[f"unet.{layer}.lora.down.weight"] = change.down
        tensors[f"unet.{layer}.lora.up.weight"] = change.up * (change.alpha / change.rank)
    for layer, change in lora.text_encoder.items():
        name = f"text_encoder.text_model.{layer}.lora_linear_layer"
        tensors[f"{name}.down.weight"] = change.down
        tensors[f"{name}.up.weight"] = change.up * (change.alpha / change.rank)
    refuse_not_finite(tensors, "the LoRA to save")
    write_safetensors(tensors, path, {} if lora.base is None else {BASE_KEY: lora.base})

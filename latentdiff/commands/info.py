"""`latentdiff info`: what a folder or a file is, from its small files and headers alone.

The modules that write what is read here import torch, so the names of their files are written out again.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.printable import cut, printable, shortened, shown

MAX_VALUE = 1000  # characters of a value that is printed
MAX_METADATA = 20  # entries of a safetensors file
STAGES = {1: "stage 1 (latentdiff train-vae)", 2: "stage 2 (latentdiff train-unet)"}
DIFFUSERS_STEM = "diffusion_pytorch_model"
LORA_FILE = "pytorch_lora_weights.safetensors"
# The first matrix of a layer's change, in the layouts of peft, diffusers and kohya's scripts.
LORA_TENSOR = re.compile(r"[._]lora(_A|[._]down|_linear_layer[.]down)[.]")
# Of a pipeline: what it is called, its folder, and how the names of its weights' files begin.
PARTS = (
    ("UNet", "unet", DIFFUSERS_STEM),
    ("text encoder", "text_encoder", "model"),
    ("autoencoder", "vae", DIFFUSERS_STEM),
)
# Of a single file in Stable Diffusion's layout: how the names of each part's tensors begin.
SINGLE_FILE_PARTS = {
    "UNet": "model.diffusion_model.",
    "text encoder": "cond_stage_model.",
    "autoencoder": "first_stage_model.",
}
PRECISIONS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}

Facts = list[tuple[str, object]]  # what and its value; None is not known, and not printed


def info(
    path: Annotated[Path, typer.Argument(metavar="FOLDER|FILE|PNG", help="A run, a model, an image, a config, ...")],
) -> None:
    """Say what a folder or a file is: a run, a model, a checkpoint, tensors, a generated image or a config."""
    title, facts = describe(path.expanduser())
    known = [(name, _line(value)) for name, value in facts if value not in (None, "")]
    width = max((len(name) for name, _ in known), default=0)
    print(f"{shown(path)}: {title}")
    for name, value in known:
        print(f"  {name:{width}}  {value}")


def describe(path: Path) -> tuple[str, Facts]:
    """What it is, and facts about it; ValueError with one line if it is nothing of this project or of diffusers."""
    from latentdiff.formats.headers import check_regular

    if path.is_dir():
        return _folder(path)
    check_regular(path)
    kinds: dict[str, Callable[[Path], tuple[str, Facts]]] = {
        ".safetensors": _tensors,
        ".png": _png,
        ".yaml": _config,
        ".yml": _config,
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{shown(path)} is no .safetensors, .png or .yaml, and no folder: nothing is known about it")
    return kind(path)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def _folder(folder: Path) -> tuple[str, Facts]:
    def has(name: str) -> bool:
        return (folder / name).exists()

    if has("manifest.json"):
        return _checkpoint(folder)
    if has("config.yaml") and (has("run.json") or has("checkpoints") or has("metrics.jsonl")):
        return _run(folder)
    if has("model_index.json"):
        return _pipeline(folder)
    if has("config.json"):
        return _model(folder)
    if has(LORA_FILE):
        return _tensors(folder / LORA_FILE)
    if configs := [name for name in ("vae.yaml", "unet.yaml") if has(name)]:
        raise ValueError(
            f"{shown(folder)} is a folder of configs: give {shown(folder / configs[0])}, or see what they take with "
            f"`latentdiff plan {folder}`"
        )
    raise ValueError(
        f"{shown(folder)} is no run, checkpoint, pipeline, model or LoRA: it has no config.yaml, manifest.json, "
        f"model_index.json, config.json or {LORA_FILE}"
    )


def _run(folder: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import json_object, yaml_mapping

    values = yaml_mapping(folder / "config.yaml")
    record = json_object(folder / "run.json") if (folder / "run.json").exists() else {}
    steps = [
        int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*") if re.fullmatch(r"\d+", path.name[5:])
    ]
    models = {"model_index.json": _pipeline, "config.json": _model, LORA_FILE: lambda run: _tensors(run / LORA_FILE)}
    model = next((name for name in models if (folder / name).exists()), None)
    finished = record.get("finished") is True and model is not None
    measured = _last_logged(folder / "metrics.jsonl", "validation/loss", "validation/mse")
    published = _last_logged(folder / "metrics.jsonl", "published_step")
    facts: Facts = [
        (
            "state",
            "finished" if finished else _holder(folder) or "not finished: the command that started it resumes it",
        ),
        ("newest checkpoint", f"step {max(steps):,} of {_number(_at(values, 'train', 'steps'))}" if steps else "none"),
        ("validation", measured and f"{measured[0]} {measured[1]:.4g} at step {_number(measured[2])}"),
        ("published", published and f"the weights of step {_number(published[1])}"),
        *_config_facts(values),
    ]
    title = f"run of {STAGES[_stage(values)]}"
    if model is None:
        return title, facts
    kind, of_model = models[model](folder)
    return title, [*facts, ("model", kind), *of_model]


def _holder(folder: Path) -> str | None:
    """Which process trains there, as far as can be told without touching its lock."""
    from latentdiff.formats.headers import json_object

    with suppress(ValueError, OSError, KeyError, TypeError, OverflowError):
        holder = json_object(folder / ".lock")
        if holder["host"] == socket.gethostname():
            with suppress(PermissionError):  # it is there, but another user's
                os.kill(_positive(holder["process"]), 0)
        return f"trains in process {holder['process']} on {holder['host']} since {holder['since']}"
    return None


def _positive(value: object) -> int:
    """A process's number: 0 and below mean groups of them."""
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{value!r} is not the number of a process")
    return value


def _last_logged(path: Path, *keys: str) -> tuple[str, float, object] | None:
    """What a run's log says last of one of these keys: the key, its value and the step."""
    from latentdiff.formats.headers import last_lines

    with suppress(ValueError, OSError, RecursionError):
        for line in reversed(last_lines(path)):
            with suppress(ValueError, RecursionError):
                values = json.loads(line)
                for key in keys:
                    if isinstance(values, dict) and isinstance(values.get(key), int | float):
                        return key, values[key], values.get("step")
    return None


def _checkpoint(folder: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import json_object

    manifest = json_object(folder / "manifest.json")
    config = manifest.get("config")
    if not isinstance(config, dict) or "sha256" not in manifest:
        raise ValueError(f"{shown(folder / 'manifest.json')} is not the manifest of a checkpoint")
    versions = manifest.get("versions")
    facts: Facts = [
        ("step", f"{_number(manifest.get('step'))} of {_number(_at(config, 'train', 'steps'))}"),
        ("size", _size(path.stat().st_size for path in folder.glob("*") if path.is_file())),
        ("written with", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None),
    ]
    return f"checkpoint of {STAGES[_stage(config)]}", facts + _config_facts(config)


def _pipeline(folder: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import json_object

    index = json_object(folder / "model_index.json")
    name = index.get("_class_name")
    ours = (folder / "generation_config.json").exists()
    title = "text-to-image pipeline" if ours else f"diffusers folder of a {shown(name)}"
    if name != "StableDiffusionPipeline":
        return title, [("opens", "not with latentdiff, which reads Stable Diffusion 1 and 2")]
    unet, vae, text, scheduler, defaults, seen = (
        json_object(folder / file) if (folder / file).exists() else {}
        for file in (
            *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
            *("scheduler/scheduler_config.json", "generation_config.json", "trained_on.json"),
        )
    )
    words = seen.get("words")
    pixel_space = index.get("vae") == [None, None]
    facts: Facts = [
        ("images", _image_size(unet, {} if pixel_space else vae)),
        *([("latents", "none: it works on the images themselves")] if pixel_space else _latents(vae)),
        ("text", f"{_number(text.get('num_hidden_layers'))} layers of width {_number(text.get('hidden_size'))}"),
        ("predicts", scheduler.get("prediction_type")),
        ("sampler", scheduler.get("_class_name")),
    ]
    if defaults:
        steps, guidance = defaults.get("num_inference_steps"), defaults.get("guidance_scale")
        facts.append(("by default", f"{_number(steps)} steps, guidance {_number(guidance)}"))
    if seen:
        captions = f"captions of {len(words):,} words" if isinstance(words, list) else "captions"
        facts.append(("trained on", captions if seen.get("captions") is True else "images without captions"))
    for name, part, stem in PARTS:
        if (folder / part).is_dir():
            facts.append((name, _weights(folder / part, stem)))
    return title, facts + _average(folder)


def _model(folder: Path) -> tuple[str, Facts]:
    """A single model of diffusers or transformers."""
    from latentdiff.formats.headers import json_object

    config = json_object(folder / "config.json")
    name = config.get("_class_name") or config.get("architectures")
    if not name:
        raise ValueError(f"{shown(folder / 'config.json')} doesn't say which model it is of")
    if name == "AutoencoderKL":
        facts = [("images", _image_size({"sample_size": config.get("sample_size")}, {})), *_latents(config)]
        return "autoencoder (AutoencoderKL)", [*facts, ("weights", _weights(folder, DIFFUSERS_STEM)), *_average(folder)]
    names = ", ".join(map(str, name)) if isinstance(name, list) else str(name)
    stem = DIFFUSERS_STEM if "_class_name" in config else "model"
    return f"model {shown(names)}", [("weights", _weights(folder, stem)), *_average(folder)]


def _average(folder: Path) -> Facts:
    """What `latentdiff ema` says of the model it wrote."""
    from latentdiff.formats.headers import json_object

    if not (folder / "ema.json").exists():
        return []
    values = json_object(folder / "ema.json")
    return [
        ("averaged over", f"{_number(values.get('length'))} of the training, to step {_number(values.get('step'))}")
    ]


def _latents(config: dict[str, Any]) -> Facts:
    """Channels and downsampling of an autoencoder, and the scale that its latents are multiplied with."""
    factor = _downsampling(config)
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    return [
        ("latents", f"{_number(config.get('latent_channels'))} channels, 1/{_number(factor)} of the image's sides"),
        ("scaling factor", _number(scale) + ("" if shift is None else f", shift {_number(shift)}")),
    ]


def _downsampling(config: dict[str, Any]) -> int | None:
    levels = config.get("block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and 0 < len(levels) <= 16 else None


def _image_size(unet: dict[str, Any], vae: dict[str, Any]) -> str | None:
    """Of the sample_size of a UNet and the autoencoder that makes its latents; {}: it works on images."""
    size, factor = unet.get("sample_size"), _downsampling(vae) if vae else 1
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    if factor is None:
        return None
    height, width = (side * factor if isinstance(side, int) else None for side in sides)
    return f"{_number(width)} x {_number(height)} pixels"


def _weights(folder: Path, stem: str) -> str:
    """Parameters and their type."""
    from latentdiff.formats.weight_files import read_weights_headers

    try:
        header = read_weights_headers(folder, stem)
    except ValueError as error:
        return f"unreadable: {error}"
    return f"{header.parameters:,} parameters, {_precisions(header.dtypes)}"


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _tensors(path: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import read_tensor_file

    header = read_tensor_file(path)
    facts: Facts = [
        ("tensors", f"{header.tensors:,}"),
        ("parameters", f"{header.parameters:,}"),
        ("types", _precisions(header.dtypes)),
        ("size", _size([path.stat().st_size])),
    ]
    said = list(header.metadata.items())[:MAX_METADATA]
    if any(name.startswith(SINGLE_FILE_PARTS["UNet"]) for name in header.sizes):
        return _single_file(header.sizes, header.metadata, facts)
    facts += [(f"metadata {shown(key)}", shown(value)) for key, value in said]
    if layers := sum(bool(LORA_TENSOR.search(name)) for name in header.sizes):
        return "LoRA", [("changes", f"{layers:,} layer{'' if layers == 1 else 's'}"), *facts]
    return "tensors (safetensors)", facts


def _single_file(sizes: dict[str, int], metadata: dict[str, str], facts: Facts) -> tuple[str, Facts]:
    """A whole model in Stable Diffusion's layout."""
    version = 2 if any(name.startswith("cond_stage_model.model.") for name in sizes) else 1
    predicts = metadata.get("modelspec.prediction_type")
    said: Facts = [
        ("images", metadata.get("modelspec.resolution")),
        ("predicts", shown(predicts) if predicts else f"the file does not say; by default what SD {version} predicts"),
    ]
    for part, prefix in SINGLE_FILE_PARTS.items():
        count = sum(size for name, size in sizes.items() if name.startswith(prefix))
        said.append((part, f"{count:,} parameters" if count else "none"))
    averages = any(name.startswith("model_ema.") for name in sizes)
    said.append(("averages", "beside the weights; they are not read" if averages else None))
    return f"single file of the structure of Stable Diffusion {version}", [*said, *facts]


def _png(path: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import read_png

    (width, height), said = read_png(path)
    if said is None:
        return f"PNG of {width} x {height} pixels that doesn't say how it was made", []
    return f"image of {width} x {height} pixels, generated with latentdiff", [(shown(k), v) for k, v in said.items()]


def _config(path: Path) -> tuple[str, Facts]:
    from latentdiff.formats.headers import yaml_mapping

    values = yaml_mapping(path)
    if not {"data", "train", "output"} <= values.keys():
        raise ValueError(f"{shown(path)} is no training config: it must have the sections data, train and output")
    recipe = path.absolute().parent.name
    return f"config of {STAGES[_stage(values)]}", [("recipe", recipe), *_config_facts(values)]


def _config_facts(values: dict[str, Any]) -> Facts:
    """The highlights of a training config."""
    return [
        ("data", _at(values, "data", "source")),
        ("image size", _at(values, "data", "size")),
        ("validation split", _at(values, "data", "validation_split")),
        ("held out", _at(values, "data", "holdout")),
        ("autoencoder", values.get("vae") or ("none: pixel space" if "vae" in values else None)),
        ("starts from", values.get("init_from")),
        ("widths", _at(values, "model", "block_out_channels")),
        ("steps", _at(values, "train", "steps")),
        ("batch size", _at(values, "train", "batch_size")),
        ("optimizer", _at(values, "optimizer", "kind")),
        ("learning rate", _at(values, "optimizer", "lr")),
        ("seed", _at(values, "train", "seed")),
        ("output folder", _at(values, "output", "folder")),
    ]


def _stage(values: dict[str, Any]) -> int:
    """Only stage 2 has the key `vae`, the autoencoder it trains on."""
    return 2 if "vae" in values else 1


# ----------------------------------------------------------------------------------------------------------------------
# Values, which may be anything


def _at(values: dict[str, Any], section: str, key: str) -> object:
    part = values.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _line(value: object) -> str:
    """A value as one line without control characters. Written out, a YAML file's aliases could be endless."""
    text = value if isinstance(value, str) else shortened(value)
    return cut(printable(" ".join(text.split("\n"))), MAX_VALUE)


def _number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else "?"


def _precisions(dtypes: Iterable[str]) -> str:
    return ", ".join(PRECISIONS.get(dtype, dtype) for dtype in dtypes)


def _size(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:,.1f} MB"

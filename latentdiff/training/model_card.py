"""The model card of a finished run: README.md beside the model, with the header that the hub reads.

A card says at its end, in a comment, what it is made from and the digest of its own text: one that was edited since,
or that someone else wrote, is left as it is.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

import torch
import yaml
from pydantic import TypeAdapter

import latentdiff
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_run_config
from latentdiff.data.index import digest_of_bytes
from latentdiff.evaluation.autoencoder import REPORT_FILE, weights_digest
from latentdiff.evaluation.scores import markdown_table
from latentdiff.formats.diffusers_folder import PIPELINE_FILE, WEIGHTS_STEM, autoencoder_folder
from latentdiff.formats.files import read_json, write_text
from latentdiff.formats.headers import read_tensor_file
from latentdiff.formats.lora import LORA_FILE
from latentdiff.formats.weight_files import read_weights_headers
from latentdiff.models.initial_model import read_initial_model
from latentdiff.models.text_encoder import is_clip
from latentdiff.printable import cut, first_line, printable
from latentdiff.training.data_record import DataRecord
from latentdiff.training.logging import PUBLISHED_STEP
from latentdiff.training.report import read_metrics
from latentdiff.training.unet_evaluation import prompts_at

CARD_FILE = "README.md"
MAX_PROMPTS = 64  # that are listed under the samples
MAX_FIGURES = 60  # of evaluation.json
MAX_TEXT = 300  # characters of a prompt
SCRIPTS = {"train_vae.py": ("latentdiff", "train-vae"), "train_unet.py": ("latentdiff", "train-unet")}  # their commands
TEXTS = ("prompts", "constant_caption")  # config keys whose values are no paths, whatever they look like
UNKNOWN_LICENSE = "unknown"  # on the hub's list
NOT_CLIP = (
    "Its text encoder is not CLIP: diffusers' StableDiffusionPipeline, ComfyUI and other Stable Diffusion tools cannot "
    "open it."
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&:.@^])")
_COMMENT = re.compile(r"\n<!-- latentdiff-card (\{.*\}) -->\n\Z")


@dataclass(frozen=True)
class Origin:
    """What is not in the folder's other files.

    command: without paths of this machine; empty if it is not known. digest: of images and captions.
    """

    command: tuple[str, ...]
    images: int
    held_out: int
    digest: str
    versions: dict[str, str]

    @classmethod
    def of(cls, data: DataRecord, command: Sequence[str]) -> Self:
        """Of a run that ends in this process."""
        images, held_out = data.images, data.held_out
        pairs = sorted(f"{image} {caption}\n" for _, image, caption in [*images, *held_out])
        versions = {"latentdiff": latentdiff.__version__, "torch": torch.__version__}
        return cls(
            tuple(map(_shareable_word, command)),
            len(images),
            len(held_out),
            digest_of_bytes("".join(pairs).encode()),
            versions,
        )


def write_card(run: Path, data: DataRecord | None, command: Sequence[str]) -> str:
    """Write the card of a finished run, if there is none or ours is unchanged; returns a line that says so.

    data: what it was trained on. command: the words that started the training. Nothing that goes wrong here is an
    error: the model is written.
    """
    assert data is not None, "the main process has it"
    return _put(run, Origin.of(data, command))


def refresh_card(run: Path) -> str | None:
    """Write a card again, such as after an evaluation, if there is one and it is unchanged; returns a line then."""
    found = _read_own(run / CARD_FILE)
    return None if found is None else _put(run, found)


def _put(run: Path, origin: Origin) -> str:
    path = run / CARD_FILE
    if (path.exists() or path.is_symlink()) and _read_own(path) is None:
        return f"{path} was written or edited by someone else: it is left as it is, no model card is written"
    try:
        write_text(_signed(card(run, origin), origin), path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no model card is written: {printable(first_line(error))}"
    return f"model card in {path}: fill in its licence"


def _signed(text: str, origin: Origin) -> str:
    facts = json.dumps({**asdict(origin), "sha256": _digest(text)})
    for char in "-<>":  # which could end the comment
        facts = facts.replace(char, f"\\u{ord(char):04x}")
    return f"{text}\n<!-- latentdiff-card {facts} -->\n"


def _read_own(path: Path) -> Origin | None:
    """What an unchanged card of ours is made from; None for any other file, and without one."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.is_symlink() or not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        found = _COMMENT.search(text)
        if found is not None:
            facts = json.loads(found[1])
            if facts.pop("sha256") == _digest(text[: found.start()]):
                return TypeAdapter(Origin).validate_python(facts)
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The text


def card(run: Path, origin: Origin) -> str:
    """The card of the model in a run's folder: Markdown, in which all that users wrote is escaped.

    Raises ValueError if the folder has no model, or no config that can be read.
    """
    config = load_run_config(run / "config.yaml")
    stage_2 = isinstance(config, UNetTrainingConfig)
    parts = _parts(run, config)
    sections = [
        _header(config, run),
        f"# {escaped(run.resolve().name)}",
        _what(config),
        _samples(run, config),
        "## Use\n\n" + (_use_pipeline(config, run) if stage_2 else _use_autoencoder(run.resolve().name)),
        "## Parts\n\n" + markdown_table(parts, "part"),
        "## Training\n\n" + _training(config, origin),
        "## Measured\n\n" + _measured(run, config),
        LICENCE,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


LICENCE = f"""## Licence

*To be filled in by who publishes this model:*

- weights: {UNKNOWN_LICENSE}. Write their licence here, and at the top of this file in `license`.
- training images and captions: {UNKNOWN_LICENSE}. Write here whose they are and under which licence: it may bind the
  use of the weights."""


def escaped(text: str) -> str:
    """A user's text as one line of Markdown that shows it as it is: no markup, HTML or link in it works."""
    line = cut(printable(" ".join(text.split())), MAX_TEXT)
    return re.sub(r"^([-=])", r"\\\1", _SPECIAL.sub(r"\\\1", line))


def fenced(code: str, language: str) -> str:
    """A block of code, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _header(config: VAETrainingConfig | UNetTrainingConfig, run: Path) -> str:
    """The YAML that the hub reads, with what is known to be true only."""
    values: dict[str, Any] = {}
    # Without an autoencoder, or with another text encoder, diffusers opens the parts only.
    if isinstance(config, VAETrainingConfig) or (not config.is_pixel_space and _has_clip(run, config)):
        values["library_name"] = "diffusers"
    tags = ["latentdiff"]
    if isinstance(config, UNetTrainingConfig) and config.trains_adapters:
        if config.init_from is not None and not Path(config.init_from).expanduser().exists():
            values["base_model"] = config.init_from  # on the hub
        tags.append("lora")
    if isinstance(config, UNetTrainingConfig):
        prompted = _understands_prompts(run)
        values["pipeline_tag"] = "text-to-image" if prompted else "unconditional-image-generation"
        tags.append("diffusion" if config.is_pixel_space else "latent-diffusion")
    else:
        tags.append("autoencoder")
    text = yaml.safe_dump({**values, "tags": tags}, sort_keys=False, allow_unicode=True)
    hint = "# fill in: such as apache-2.0, cc-by-4.0 or other"
    return f"---\nlicense: {UNKNOWN_LICENSE} {hint}\n{text}---"


def _understands_prompts(run: Path) -> bool:
    path = run / "trained_on.json"
    return not path.is_file() or read_json(path).get("captions") is True


def _what(config: VAETrainingConfig | UNetTrainingConfig) -> str:
    height, width = config.data.shape
    images = f"images of {width} x {height} pixels"
    if config.data.buckets:
        images += ", or as many in other shapes"
    made = "trained with latentdiff, which trains text-to-image diffusion models from scratch"
    if isinstance(config, VAETrainingConfig):
        f, channels = config.model.downsampling, config.model.latent_channels
        return f"An autoencoder for {images}, with latents of {channels} x {height // f} x {width // f}: {made}."
    if config.trains_adapters:
        return f"A LoRA for {escaped(base_name(config))} and {images}: {made}."
    kind = "diffusion model in pixel space" if config.is_pixel_space else "latent diffusion model"
    return f"A text-to-image {kind} for {images}: {made}."


def newest_samples(run: Path) -> Path | None:
    """The sample grid of the latest step."""
    grids = [path for path in (run / "samples").glob("step_*.png") if re.fullmatch(r"step_\d+", path.stem)]
    return max(grids, key=lambda path: int(path.stem[5:]), default=None)


def _samples(run: Path, config: VAETrainingConfig | UNetTrainingConfig) -> str:
    grid = newest_samples(run)
    if grid is None:
        return ""
    step = int(grid.stem[5:])
    image = f"![samples at step {step:,}](samples/{grid.name})"
    if isinstance(config, VAETrainingConfig):
        return f"{image}\n\nAbove images of the data set, below their reconstructions, at step {step:,}."
    prompts = prompts_at(step, config.validation)
    lines = [f"{i}. {escaped(prompt) or '(the empty prompt)'}" for i, prompt in enumerate(prompts[:MAX_PROMPTS], 1)]
    if len(prompts) > MAX_PROMPTS:
        lines.append(f"\n... and {len(prompts) - MAX_PROMPTS} more.")
    how = f"{config.validation.num_inference_steps} steps of {config.validation.sampler}"
    seeds = f"the first with seed {config.validation.seed}, the next ones count up"
    said = f"At step {step:,}, row by row, {seeds}; {how}, guidance {config.validation.guidance_scale:g}:"
    return f"{image}\n\n{said}\n\n" + "\n".join(lines)


def base_name(config: UNetTrainingConfig | VAETrainingConfig) -> str:
    """The model of init_from, without the path on this machine."""
    assert config.init_from is not None
    return _name_of_private(config.init_from)


def _has_clip(run: Path, config: UNetTrainingConfig) -> bool:
    """Whether the text encoder of a run, or of its LoRA's model, is one that Stable Diffusion tools know."""
    if config.trains_adapters:
        assert config.init_from is not None
        return is_clip(read_initial_model(config.init_from, config.diffusion.prediction_type).text_encoder)
    path = run / "text_encoder" / "config.json"
    return not path.is_file() or is_clip(read_json(path))


def _use_pipeline(config: UNetTrainingConfig, run: Path) -> str:
    name = run.resolve().name
    prompt = cut(printable(" ".join(config.validation.prompts[0].split())), MAX_TEXT)
    place = "this folder" if config.trains_adapters else "this folder, or its name on the hub"
    ours = (
        "from latentdiff import LatentDiffusionPipeline\n\n"
        f"pipeline = LatentDiffusionPipeline.from_pretrained({name!r})  # {place}\n"
        f'pipeline({prompt!r}, seed=0).images[0].save("image.png")'
    )
    if config.is_pixel_space:
        return fenced(ours, "python")
    if not _has_clip(run, config):
        return f"{fenced(ours, 'python')}\n\n{NOT_CLIP}"
    opened = f"pipeline = StableDiffusionPipeline.from_pretrained({name!r})\n"
    if config.trains_adapters:
        opened = (
            f"pipeline = StableDiffusionPipeline.from_pretrained({base_name(config)!r})\n"
            f"pipeline.load_lora_weights({name!r})\n"
        )
    theirs = (
        f"from diffusers import StableDiffusionPipeline\n\n{opened}"
        f"pipeline({prompt!r}, num_inference_steps={config.validation.num_inference_steps}, "
        f"guidance_scale={config.validation.guidance_scale:g}).images[0]"
    )
    return f"{fenced(ours, 'python')}\n\nWith diffusers:\n\n{fenced(theirs, 'python')}"


def _use_autoencoder(name: str) -> str:
    return fenced(
        "from latentdiff import AutoencoderKL  # or: from diffusers import AutoencoderKL\n\n"
        f"vae = AutoencoderKL.from_pretrained({name!r})  # this folder",
        "python",
    )


def _parts(run: Path, config: VAETrainingConfig | UNetTrainingConfig) -> list[tuple[str, dict[str, str]]]:
    """Rows of a table: each part with its parameters."""
    if isinstance(config, UNetTrainingConfig) and config.trains_adapters:
        header = read_tensor_file(run / LORA_FILE)
        said = f"rank {config.lora.rank}, {header.tensors // 2} layers"
        return [("LoRA", {"parameters": f"{header.parameters:,}", "": said})]
    if isinstance(config, VAETrainingConfig):
        folders = {"autoencoder": (run, WEIGHTS_STEM)}
    else:
        folders = {"UNet": (run / "unet", WEIGHTS_STEM), "text encoder": (run / "text_encoder", "model")}
        if not config.is_pixel_space:
            folders = {"autoencoder": (run / "vae", WEIGHTS_STEM), **folders}
    said = {"autoencoder": _latents(run)}
    if isinstance(config, UNetTrainingConfig):
        said["text encoder"] = "trained with the UNet" if config.trains_text_encoder else "frozen, pretrained"
        said["UNet"] = f"predicts {config.diffusion.prediction_type}"
    return [
        (name, {"parameters": f"{read_weights_headers(*place).parameters:,}", "": said.get(name, "")})
        for name, place in folders.items()
    ]


def _latents(run: Path) -> str:
    if (run / PIPELINE_FILE).is_file() and not (run / "vae").is_dir():
        return ""
    config = read_json(autoencoder_folder(run) / "config.json")
    scale = f"{config['latent_channels']} latent channels, scaling factor {config['scaling_factor']:g}"
    return f"{scale}, 1/{2 ** (len(config['block_out_channels']) - 1)} of the image's sides"


def _training(config: VAETrainingConfig | UNetTrainingConfig, origin: Origin) -> str:
    source = escaped(without_private_paths({"source": config.data.source})["source"])
    count = f"{origin.images:,} images, {origin.held_out:,} held out"
    data = f"- data: {source}, {count}; fingerprint `{origin.digest}`, of all images and captions"
    steps = f"- {config.train.steps:,} steps of {config.train.batch_size} images, seed {config.train.seed}"
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    lines = [data, steps, f"- versions: {versions}", "- every setting: [config.yaml](config.yaml)"]
    if config.init_from is not None:
        lines.insert(0, f"- starts from the weights of {escaped(base_name(config))}")
    if not origin.command:
        return "\n".join(lines)
    script, *words = (" ".join(word.split()) for word in origin.command)
    command = shlex.join([*SCRIPTS.get(script, ("python", script)), *words])
    return "\n".join(lines) + "\n\n" + fenced(printable(command), "")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def _measured(run: Path, config: VAETrainingConfig | UNetTrainingConfig) -> str:
    parts = [_validation(run, config), _autoencoder_figures(run, config), _evaluation(run)]
    return "\n\n".join(part for part in parts if part) or "Nothing yet."


def _validation(run: Path, config: VAETrainingConfig | UNetTrainingConfig) -> str:
    """The loss on held-out images of the published step, and of the last one."""
    metrics = read_metrics(run / "metrics.jsonl")
    published = int(next(reversed(metrics.get(PUBLISHED_STEP, {0: config.train.steps}).values())))
    lines = [f"The weights are the averages (EMA) of step {published:,} of {config.train.steps:,}."]
    key, name = ("loss", "validation loss") if isinstance(config, UNetTrainingConfig) else ("mse", "held-out MSE")
    losses = metrics.get(f"validation/{key}", {})
    if published in losses:
        best = min(losses, key=lambda step: losses[step])
        more = ", the lowest" if best == published else f"; the lowest is {losses[best]:.4g}, of step {best:,}"
        lines.append(f"Their {name} is {losses[published]:.4g}{more}.")
    if published in (baseline := metrics.get("validation/baseline", {})):
        lines.append(f"Without looking at the noisy image one gets {baseline[published]:.4g}.")
    return " ".join(lines)


def _autoencoder_figures(run: Path, config: VAETrainingConfig | UNetTrainingConfig) -> str:
    """What `latentdiff evaluate-vae` measured of this autoencoder, here or in stage 1."""
    places = [run]
    if isinstance(config, UNetTrainingConfig):
        if config.vae is None or config.trains_adapters:
            return ""
        given = Path(config.vae).expanduser()
        places = [run / "vae", *([given] if given.is_dir() else [])]
    weights = autoencoder_folder(run)
    for place in places:
        with suppress(ValueError, KeyError, TypeError, OSError):
            values = read_json(autoencoder_folder(place) / REPORT_FILE)
            if values["weights_sha256"] == weights_digest(weights):
                report = values["report"]
                kind = "held-out" if " held-out images of " in values["data"] else "training"
                rows = {"PSNR (dB)": f"{report['psnr']:.2f}", "SSIM": f"{report['ssim']:.4f}"}
                rows["KL (nats per image)"] = f"{report['kl']:.1f}"
                rows["fit for stage 2"] = "yes" if values["fit"] is True else "no"
                return markdown_table([(f"{report['images']:,} {kind}", rows)], "autoencoder, on images")
    return ""


def _evaluation(run: Path) -> str:
    """What `latentdiff evaluate` measured of these weights; one of older weights is left out."""
    path = run / "evaluation.json"
    weights = next((run / "unet").glob(f"{WEIGHTS_STEM}*.safetensors"), None)
    if not path.is_file() or weights is None or path.stat().st_mtime < weights.stat().st_mtime:
        return ""
    rows = [(escaped(name), {"value": escaped(value)}) for name, value in _flat(read_json(path))[:MAX_FIGURES]]
    return markdown_table(rows, "evaluation") if rows else ""


def _flat(values: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """Names and values of a JSON object; hits and total as one."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{place}{key}".replace("_", " ")
        if isinstance(value, dict) and value.keys() == {"hits", "total"}:
            rows.append((name, f"{value['hits']} of {value['total']}"))
        elif isinstance(value, dict):
            rows += _flat(value, f"{name}, ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, int | str):
            rows.append((name, str(value)))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Paths of the user's machine


def without_private_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with the names alone of files and folders that are given from the root or from the home.

    "/home/someone/photos" becomes "photos"; relative paths below the working folder, and hub ids, stay.
    """
    return {key: value if key in TEXTS else _shareable(value) for key, value in values.items()}


def _shareable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_private_paths(value)
    if isinstance(value, list):
        return [_shareable(part) for part in value]
    return _name_of_private(value) if isinstance(value, str) else value


def _name_of_private(text: str) -> str:
    windows = PureWindowsPath(text)
    path = windows if windows.drive else PurePosixPath(text.removeprefix("file://"))
    private = path.is_absolute() or text.startswith(("~", "file:")) or ".." in path.parts
    return path.name.lstrip("~") if private else text


def _shareable_word(word: str) -> str:
    """The same of a word of a command line, also in key=value."""
    key, equals, value = word.partition("=")
    if not equals:
        return _name_of_private(word)
    try:
        given = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        given = value
    shareable = without_private_paths({key.rpartition(".")[2]: given})[key.rpartition(".")[2]]
    if shareable == given:
        return word
    return f"{key}={shareable if isinstance(shareable, str) else json.dumps(shareable, ensure_ascii=False)}"

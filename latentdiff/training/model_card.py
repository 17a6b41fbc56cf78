"""The model card of a run: README.md beside its model, or beside a copy of it, with the header that the hub reads.

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
from urllib.parse import unquote

import torch
import yaml
from pydantic import TypeAdapter

import latentdiff
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_run_config
from latentdiff.data.index import digest_of_bytes
from latentdiff.evaluation.autoencoder import REPORT_FILE, weights_digest
from latentdiff.evaluation.scores import markdown_table
from latentdiff.figures.charts import published_step
from latentdiff.formats.diffusers_folder import WEIGHTS_STEM, autoencoder_folder
from latentdiff.formats.files import read_json, write_text
from latentdiff.formats.headers import read_tensor_file, small_text, yaml_mapping
from latentdiff.formats.lora import LORA_FILE
from latentdiff.formats.weight_files import read_weights_headers
from latentdiff.models.initial_model import read_initial_model
from latentdiff.models.text_encoder import is_clip
from latentdiff.printable import cut, first_line, images_of, printable
from latentdiff.training.data_record import DataRecord
from latentdiff.training.report import read_metrics
from latentdiff.training.unet_evaluation import prompts_at

CARD_FILE, CONFIG_FILE = "README.md", "config.yaml"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
MAX_CARD_BYTES = 1_000_000
MAX_PROMPTS = 64  # that are listed under the samples
MAX_FIGURES = 60  # of evaluation.json
MAX_TEXT = 300  # characters of a prompt
SCRIPTS = {"train_vae.py": ("latentdiff", "train-vae"), "train_unet.py": ("latentdiff", "train-unet")}  # their commands
TEXTS = ("prompts", "constant_caption")  # config keys whose values are no paths, whatever they look like
AVERAGES, TRAINED = "the averages (EMA)", "the trained ones, not averaged,"  # training measures the averages
UNKNOWN_LICENSE = "unknown"  # on the hub's list
NOT_CLIP = (
    "Its text encoder is not CLIP: diffusers' StableDiffusionPipeline, ComfyUI and other Stable Diffusion tools cannot "
    "open it."
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&:.@^])")
# Neither runs over the beginning of another one, or the time would grow with the square of the card's length.
_IMAGE = re.compile(r"!\[[^\[\]]*\]\(\s*<?([^)>\s]+)|<img\s[^<>]*?src=[\"']([^\"']+)")
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
    def of(cls, data: DataRecord, command: Sequence[str], versions: dict[str, str] | None = None) -> Self:
        """versions: of the libraries; None: of a run that ends in this process."""
        images, held_out = data.images, data.held_out
        pairs = sorted(f"{image} {caption}\n" for _, image, caption in [*images, *held_out])
        versions = versions or {"latentdiff": latentdiff.__version__, "torch": torch.__version__}
        return cls(
            tuple(map(_shareable_word, command)),
            len(images),
            len(held_out),
            digest_of_bytes("".join(pairs).encode()),
            versions,
        )


@dataclass(frozen=True)
class Copy:
    """A model of a run that is written into another folder.

    model: the folder with its files. name: of the folder that it will be. step: of training; None: the published one.
    weights: which of that step, in words. dtype: what they are rounded to, if anything.
    """

    model: Path
    name: str
    step: int | None = None
    weights: str = AVERAGES
    dtype: str | None = None


def write_card(run: Path, data: DataRecord | None, command: Sequence[str]) -> str:
    """Write the card of a finished run, if there is none or ours is unchanged; returns a line that says so.

    data: what it was trained on. command: the words that started the training. Nothing that goes wrong here is an
    error: the model is written.
    """
    assert data is not None, "the main process has it"
    return _put(run, Origin.of(data, command))


def refresh_card(run: Path) -> str | None:
    """Write a card again, such as after an evaluation, if there is one and it is unchanged; returns a line then."""
    found = origin_of_own(run)
    return None if found is None else _put(run, found)


def origin_of_own(run: Path) -> Origin | None:
    """What the card of a run is made from; None if it has none, or someone else wrote or edited it."""
    path = run / CARD_FILE
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.is_symlink() or not path.is_file():
            return None
        text = small_text(path, MAX_CARD_BYTES)
        found = _COMMENT.search(text)
        if found is not None:
            facts = json.loads(found[1])
            if facts.pop("sha256") == _digest(text[: found.start()]):
                return TypeAdapter(Origin).validate_python(facts)
    return None


def _put(run: Path, origin: Origin) -> str:
    path = run / CARD_FILE
    if (path.exists() or path.is_symlink()) and origin_of_own(run) is None:
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def images_shown(path: Path) -> list[str]:
    """The names of the images in its folder that a card shows."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    names = [PurePosixPath(unquote(found[1] or found[2])) for found in _IMAGE.finditer(text)]
    return [
        str(name)
        for name in names
        if name.suffix.lower() in IMAGE_SUFFIXES and not name.is_absolute() and ".." not in name.parts
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The text


def card(run: Path, origin: Origin, copy: Copy | None = None) -> str:
    """The card of the model in a run's folder, or of a copy: Markdown, in which all that users wrote is escaped.

    Raises ValueError if there is no model, or no config that can be read.
    """
    config = load_run_config(run / CONFIG_FILE)
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else {}
    copy = copy or Copy(run, run.resolve().name)
    model, name, step = copy.model, copy.name, copy.step
    if step is None:
        step = published_step(metrics)
    if step is None and metrics:  # of a model that was downloaded the log is missing, and its step is not known
        step = config.train.steps
    is_lora = (model / LORA_FILE).is_file()
    if isinstance(config, UNetTrainingConfig):
        prompt = config.validation.prompts[0]
        steps, guidance = config.validation.num_inference_steps, config.validation.guidance_scale
        base = base_name(config) if is_lora else None
        use = use_pipeline(name, base, prompt, steps, guidance, config.is_pixel_space, _has_clip(model, config))
    else:
        use = _use_autoencoder(name)
    sections = [
        _header(config, model),
        f"# {escaped(name)}",
        _what(config, is_lora),
        _samples(run, config, config.train.steps if step is None else step, copy.weights),
        "## Use\n\n" + use,
        "## Parts\n\n" + markdown_table(_parts(model, config), "part"),
        "## Training\n\n" + _training(config, origin),
        "## Measured\n\n" + _measured(run, config, metrics, step, copy),
        LICENCE,
    ]
    return joined(sections)


def joined(sections: Sequence[str]) -> str:
    """The sections of a card that are not empty, as its text."""
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


def _header(config: VAETrainingConfig | UNetTrainingConfig, model: Path) -> str:
    if isinstance(config, VAETrainingConfig):
        return header({"library_name": "diffusers", "tags": ["latentdiff", "autoencoder"]})
    values: dict[str, Any] = {}
    tags = ["latentdiff"]
    # Without an autoencoder, or with another text encoder, diffusers opens the parts only.
    if not config.is_pixel_space and _has_clip(model, config):
        values["library_name"] = "diffusers"
    if config.trains_adapters:
        if config.init_from is not None and not Path(config.init_from).expanduser().exists():
            values["base_model"] = config.init_from  # on the hub
        tags.append("lora")
    values["pipeline_tag"] = pipeline_tag(model)
    return header({**values, "tags": [*tags, "diffusion" if config.is_pixel_space else "latent-diffusion"]})


def header(values: Mapping[str, Any]) -> str:
    """The YAML that the hub reads; the licence is for the publisher to fill in."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    hint = "# fill in: such as apache-2.0, cc-by-4.0 or other"
    return f"---\nlicense: {UNKNOWN_LICENSE} {hint}\n{text}---"


def pipeline_tag(model: Path) -> str:
    """The hub's word for what a pipeline does."""
    path = model / "trained_on.json"
    prompted = not path.is_file() or read_json(path).get("captions") is True
    return "text-to-image" if prompted else "unconditional-image-generation"


def _what(config: VAETrainingConfig | UNetTrainingConfig, is_lora: bool) -> str:
    height, width = config.data.shape
    images = f"images of {width} x {height} pixels"
    if config.data.buckets:
        images += ", or as many in other shapes"
    made = "trained with latentdiff, which trains text-to-image diffusion models from scratch"
    if isinstance(config, VAETrainingConfig):
        f, channels = config.model.downsampling, config.model.latent_channels
        return f"An autoencoder for {images}, with latents of {channels} x {height // f} x {width // f}: {made}."
    if is_lora:
        return f"A LoRA for {escaped(base_name(config))} and {images}: {made}."
    if config.trains_adapters:
        return f"{escaped(base_name(config))} with a LoRA for {images} in its weights: {made}."
    kind = "diffusion model in pixel space" if config.is_pixel_space else "latent diffusion model"
    return f"A text-to-image {kind} for {images}: {made}."


def _grid_of(run: Path, step: int) -> Path | None:
    """The sample grid of a step, else the last one before it, else the first one after it."""
    grids = [path for path in (run / "samples").glob("step_*.png") if re.fullmatch(r"step_\d+", path.stem)]
    steps = {int(path.stem[5:]): path for path in grids}
    before = [at for at in steps if at <= step]
    return steps[max(before) if before else min(steps)] if steps else None


def _samples(run: Path, config: VAETrainingConfig | UNetTrainingConfig, of: int, weights: str) -> str:
    grid = _grid_of(run, of)
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
    drawn = "" if weights == AVERAGES else f", drawn with {AVERAGES} of the training, not with these weights"
    said = f"At step {step:,}{drawn}, row by row, {seeds}; {how}, guidance {config.validation.guidance_scale:g}:"
    return f"{image}\n\n{said}\n\n" + "\n".join(lines)


def base_name(config: UNetTrainingConfig | VAETrainingConfig) -> str:
    """The model of init_from, without the path on this machine."""
    assert config.init_from is not None
    return name_of_private(config.init_from)


def _has_clip(model: Path, config: UNetTrainingConfig) -> bool:
    if (model / LORA_FILE).is_file():
        assert config.init_from is not None
        return is_clip(read_initial_model(config.init_from, config.diffusion.prediction_type).text_encoder)
    return has_clip(model)


def has_clip(model: Path) -> bool:
    """Whether the text encoder of a pipeline's folder is one that Stable Diffusion tools know."""
    path = model / "text_encoder" / "config.json"
    return not path.is_file() or is_clip(read_json(path))


def use_pipeline(
    name: str, base: str | None, prompt: str, steps: int, guidance: float, pixel_space: bool, clip: bool
) -> str:
    """How a pipeline's folder is opened. base: the model that it is a LoRA for. clip: as of `has_clip`."""
    prompt = cut(printable(" ".join(prompt.split())), MAX_TEXT)
    place = "this folder" if base is not None else "this folder, or its name on the hub"
    ours = (
        "from latentdiff import LatentDiffusionPipeline\n\n"
        f"pipeline = LatentDiffusionPipeline.from_pretrained({name!r})  # {place}\n"
        f'pipeline({prompt!r}, seed=0).images[0].save("image.png")'
    )
    if pixel_space:
        return fenced(ours, "python")
    if not clip:
        return f"{fenced(ours, 'python')}\n\n{NOT_CLIP}"
    opened = f"pipeline = StableDiffusionPipeline.from_pretrained({name!r})\n"
    if base is not None:
        opened = f"pipeline = StableDiffusionPipeline.from_pretrained({base!r})\npipeline.load_lora_weights({name!r})\n"
    theirs = (
        f"from diffusers import StableDiffusionPipeline\n\n{opened}"
        f"pipeline({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]"
    )
    return f"{fenced(ours, 'python')}\n\nWith diffusers:\n\n{fenced(theirs, 'python')}"


def _use_autoencoder(name: str) -> str:
    return fenced(
        "from latentdiff import AutoencoderKL  # or: from diffusers import AutoencoderKL\n\n"
        f"vae = AutoencoderKL.from_pretrained({name!r})  # this folder",
        "python",
    )


def _parts(model: Path, config: VAETrainingConfig | UNetTrainingConfig) -> list[tuple[str, dict[str, str]]]:
    if isinstance(config, VAETrainingConfig):
        return [_part("autoencoder", model, WEIGHTS_STEM, _latents(model))]
    if (model / LORA_FILE).is_file():
        found = read_tensor_file(model / LORA_FILE)
        said = f"rank {config.lora.rank}, {found.tensors // 2} layers"
        return [("LoRA", {"parameters": f"{found.parameters:,}", "": said})]
    text = "trained with the UNet" if config.trains_text_encoder else "frozen, pretrained"
    return pipeline_parts(model, config.diffusion.prediction_type, text)


def pipeline_parts(model: Path, prediction_type: str, text_encoder: str) -> list[tuple[str, dict[str, str]]]:
    """Rows of a table: each part of a pipeline's folder with its parameters. text_encoder: what is said of it."""
    parts = [
        _part("UNet", model / "unet", WEIGHTS_STEM, f"predicts {prediction_type}"),
        _part("text encoder", model / "text_encoder", "model", text_encoder),
    ]
    if (model / "vae").is_dir():
        parts.insert(0, _part("autoencoder", model / "vae", WEIGHTS_STEM, _latents(model)))
    return parts


def _part(name: str, folder: Path, stem: str, said: str) -> tuple[str, dict[str, str]]:
    return name, {"parameters": f"{read_weights_headers(folder, stem).parameters:,}", "": said}


def _latents(model: Path) -> str:
    config = read_json(autoencoder_folder(model) / "config.json")
    scale = f"{config['latent_channels']} latent channels, scaling factor {config['scaling_factor']:g}"
    return f"{scale}, 1/{2 ** (len(config['block_out_channels']) - 1)} of the image's sides"


def _training(config: VAETrainingConfig | UNetTrainingConfig, origin: Origin) -> str:
    source = escaped(without_private_paths({"source": config.data.source})["source"])
    count = f"{images_of(origin.images, 'training')}, {origin.held_out:,} held out"
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


def _measured(
    run: Path,
    config: VAETrainingConfig | UNetTrainingConfig,
    metrics: Mapping[str, Mapping[int, float]],
    step: int | None,
    copy: Copy,
) -> str:
    rounded = "" if copy.dtype is None else f", rounded to {copy.dtype}"
    of = "an unknown step" if step is None else f"step {step:,}"
    weights = f"The weights are {copy.weights} of {of} of {config.train.steps:,}{rounded}."
    loss = _validation(metrics, config, step) if copy.weights == AVERAGES and step is not None else ""
    evaluation = _evaluation(run) if copy.step is None else ""
    parts = [f"{weights} {loss}".strip(), _autoencoder_figures(run, copy.model, config), evaluation]
    return "\n\n".join(part for part in parts if part)


def _validation(
    metrics: Mapping[str, Mapping[int, float]], config: VAETrainingConfig | UNetTrainingConfig, step: int
) -> str:
    """The loss on held-out images of a step's averages, and the lowest of the run."""
    lines: list[str] = []
    key, name = ("loss", "validation loss") if isinstance(config, UNetTrainingConfig) else ("mse", "held-out MSE")
    losses = metrics.get(f"validation/{key}", {})
    if step in losses:
        best = min(losses, key=lambda at: losses[at])
        more = ", the lowest" if best == step else f"; the lowest is {losses[best]:.4g}, of step {best:,}"
        lines.append(f"Their {name} is {losses[step]:.4g}{more}.")
    if step in (baseline := metrics.get("validation/baseline", {})):
        lines.append(f"Without looking at the noisy image one gets {baseline[step]:.4g}.")
    return " ".join(lines)


def _autoencoder_figures(run: Path, model: Path, config: VAETrainingConfig | UNetTrainingConfig) -> str:
    """What `latentdiff evaluate-vae` measured of the model's autoencoder, in the run's folder or in stage 1."""
    places = [run]
    if isinstance(config, UNetTrainingConfig):
        if config.vae is None or config.trains_adapters:
            return ""
        given = Path(config.vae).expanduser()
        places = [run / "vae", *([given] if given.is_dir() else [])]
    weights = autoencoder_folder(model)
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


def shareable_config(path: Path) -> str:
    """The text of a run's config, without private paths; the file's own if it has none."""
    values = yaml_mapping(path)
    shareable = without_private_paths(values)
    if shareable == values:
        return path.read_text(encoding="utf-8")
    return yaml.safe_dump(shareable, sort_keys=False, allow_unicode=True)


def _shareable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_private_paths(value)
    if isinstance(value, list):
        return [_shareable(part) for part in value]
    return name_of_private(value) if isinstance(value, str) else value


def name_of_private(text: str) -> str:
    """A text, or of a path from the root, from the home or upwards its last name."""
    windows = PureWindowsPath(text)
    path = windows if windows.drive else PurePosixPath(text.removeprefix("file://"))
    private = path.is_absolute() or text.startswith(("~", "file:")) or ".." in path.parts
    return path.name.lstrip("~") if private else text


def _shareable_word(word: str) -> str:
    """The same of a word of a command line, also in key=value."""
    key, equals, value = word.partition("=")
    if not equals:
        return name_of_private(word)
    try:
        given = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        given = value
    shareable = without_private_paths({key.rpartition(".")[2]: given})[key.rpartition(".")[2]]
    if shareable == given:
        return word
    return f"{key}={shareable if isinstance(shareable, str) else json.dumps(shareable, ensure_ascii=False)}"

"""The pipeline that stage 2 starts from, `init_from`: its configs, what a training config takes from them, its UNet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from latentdiff.config import AutoencoderKLConfig, CLIPTextConfig, UNetConfig
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.diffusers_folder import PIPELINE_FILE, WEIGHTS_STEM, is_pixel_space, read_config
from latentdiff.formats.files import read_json
from latentdiff.formats.hub import local_path, model_patterns
from latentdiff.formats.lora import holds_lora
from latentdiff.formats.scheduler_config import read_schedule
from latentdiff.formats.single_file import PADDING, read_single_file
from latentdiff.models.autoencoder import read_autoencoder_config
from latentdiff.models.pretrained_text import tokenizer_folder
from latentdiff.models.text_encoder import PART, is_clip
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet

HINT = "give the folder of a finished run or of another pipeline, a single file or a hub id"
_FILES = (
    PIPELINE_FILE,
    *(f"{part}/config.json" for part in ("unet", "vae", PART)),
    *("scheduler/scheduler_config.json", "trained_on.json"),
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a text encoder that is trained, the tokenizer's


@dataclass(frozen=True)
class InitialModel:
    """The small files of a pipeline.

    path: its folder or single file. vae: None in pixel space. text_encoder: the contents of its config.json.
    says_prediction: whether it says what its UNet predicts, which few single files do.
    """

    path: Path
    unet: UNetConfig
    vae: AutoencoderKLConfig | None
    text_encoder: dict[str, Any]
    schedule: NoiseSchedule
    says_prediction: bool = True

    @property
    def clip(self) -> CLIPTextConfig:
        """The config of its text encoder; ValueError if that is not CLIP's."""
        if not is_clip(self.text_encoder):
            raise ValueError(
                f"text.config is of CLIP, but the text encoder of init_from is {self.text_encoder['model_type']!r:.80};"
                " leave text out to use it as it is"
            )
        return CLIPTextConfig.from_transformers(self.text_encoder, f"{self.path}, its text encoder")

    @property
    def pad_token(self) -> str:
        """What its tokenizer, CLIP's, pads with."""
        if self.path.is_file():
            return PADDING[read_single_file(self.path).layout]
        return CLIPTokenizer.load(tokenizer_folder(self.path)).pad_token


def read_initial_model(name: str, prediction_type: str | None) -> InitialModel:
    """What is in a pipeline's folder, single file or hub repository, without its weights.

    prediction_type: of a single file that does not say it; None: Stable Diffusion's.
    Raises ValueError if there is none, or it is damaged or of an unsupported kind.
    """
    path = local_path(name, _FILES, "init_from", HINT)
    if path.is_file():
        file = read_single_file(path)
        schedule = read_schedule(file.scheduler_config(file.prediction_type or prediction_type))
        return InitialModel(path, file.unet, file.vae, file.text_encoder, schedule, file.prediction_type is not None)
    if holds_lora(path):
        raise ValueError(f"init_from {name!r} is a LoRA: latentdiff export makes a pipeline of it to start from")
    if not (path / PIPELINE_FILE).is_file():
        raise ValueError(f"init_from {name!r} is not the folder of a pipeline or of a finished run, nor a single file")
    unet, scheduler = path / "unet" / "config.json", path / "scheduler" / "scheduler_config.json"
    try:
        schedule = read_schedule(read_json(scheduler))
    except ValueError as error:
        raise ValueError(str(error) if str(scheduler) in str(error) else f"{scheduler}: {error}") from None
    return InitialModel(
        path,
        UNetConfig.from_diffusers(read_config(unet, UNetConfig.diffusers_class), str(unet)),
        None if is_pixel_space(path) else read_autoencoder_config(path),
        read_json(path / PART / "config.json"),
        schedule,
    )


def with_initial_model(values: dict[str, Any]) -> dict[str, Any]:
    """A stage 2 config's values, completed by what `init_from` has.

    Of `model` (but for the size), `diffusion` and `text.config` what is not given is its own; without `text` its text
    encoder is used, frozen. It is not opened where nothing is missing, as in the config.yaml of a run.
    Raises ValueError as `read_initial_model` does, and if `vae` is null where its UNet is for latents.
    """
    name = values.get("init_from")
    model, diffusion, text = (values.get(key) or {} for key in ("model", "diffusion", "text"))
    if not isinstance(name, str) or not all(isinstance(section, dict) for section in (model, diffusion, text)):
        return values  # said when it is validated
    text = text or {"pretrained": name}
    trained = text.get("config")
    if _has_all(model, diffusion, text):
        return values | {"text": text}
    initial = read_initial_model(name, diffusion.get("prediction_type"))
    if values.get("vae", name) is None and initial.vae is not None:  # 4 latent channels would be taken for RGBA
        raise ValueError(f"vae is null, but the UNet of init_from is for latents; give its autoencoder: vae={name}")
    if isinstance(trained, dict):
        config = initial.clip.model_dump(mode="json", exclude={*_SPECIAL_IDS})
        text = {**text, "config": config | trained}
        if text.get("pad_token") is None:
            text["pad_token"] = initial.pad_token
    own = initial.unet.model_dump(mode="json", exclude={"sample_size"})
    return values | {"model": own | model, "diffusion": asdict(initial.schedule) | diffusion, "text": text}


def _has_all(model: Mapping[str, Any], diffusion: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether nothing is left for the initial model to say."""
    wanted = {*UNetConfig.model_fields} - {"sample_size"}, {field.name for field in fields(NoiseSchedule)}
    given = wanted[0] <= model.keys() and wanted[1] <= diffusion.keys()
    trained = text.get("config")
    if not isinstance(trained, dict):
        return given
    return given and {*CLIPTextConfig.model_fields} - {*_SPECIAL_IDS} <= trained.keys() and bool(text.get("pad_token"))


def open_initial_unet(name: str) -> UNet:
    """The UNet of a pipeline's folder, single file or hub repository, in float32.

    Raises ValueError if there is none, or as `UNet.from_pretrained` does.
    """
    path = Path(name).expanduser()
    if path.is_file():
        file = read_single_file(path)
        return UNet.from_weights(file.unet, file.weights()["unet"], f"{path}, its UNet", torch.float32)
    folder = local_path(name, model_patterns(WEIGHTS_STEM, None, "unet"), "init_from", HINT)
    return UNet.from_pretrained(folder / "unet", dtype=torch.float32)

"""`latentdiff ema`: averages of a run's weights, of lengths chosen after training, measured and written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_run_config
from latentdiff.data.captioned_images import CaptionedImages, open_run_images
from latentdiff.data.latent_cache import encode_means
from latentdiff.devices import choose_device
from latentdiff.formats.files import load_strictly, write_json, write_text
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.ema import load_trained
from latentdiff.training.exported_card import write_exported_card
from latentdiff.training.model_card import Copy
from latentdiff.training.posthoc_ema import SNAPSHOTS, plan_synthesis, synthesise
from latentdiff.training.run_folder import refuse_run
from latentdiff.training.unet_evaluation import validation_loss
from latentdiff.training.vae_evaluation import validate_vae
from latentdiff.training.vae_model import initial_autoencoder, scale_latents

DEFAULT_LENGTHS = (0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25)
SWEEP_FILE = "ema_sweep.json"


@dataclass(frozen=True)
class Row:
    """One length of a sweep."""

    length: float  # sigma_rel
    profile_error: float  # of the synthesised profile, relative
    loss: float


@dataclass(frozen=True)
class Sweep:
    """How the length of the average changes the loss on held-out images."""

    step: int
    measure: str  # what `loss` is
    rows: list[Row]
    best: float  # the length with the lowest loss
    final: float | None  # the loss of the run's final model; None if the run has not finished

    def table(self) -> str:
        """The rows as text, with the best one marked."""
        lines = [f"{'length':>9}  {'profile error':>13}  {self.measure}"]
        for row in self.rows:
            mark = "  <- best" if row.length == self.best else ""
            lines.append(f"{row.length:>9g}  {row.profile_error:>13.1%}  {row.loss:.6f}{mark}")
        if self.final is not None:
            lines.append(f"{'final':>9}  {'':>13}  {self.final:.6f}")
        return "\n".join(lines)


def sweep(run: Path, lengths: Sequence[float], step: int | None, device: str | None, progress: bool) -> Sweep:
    """Measure averages of several lengths at `step` (None: the newest snapshot); writes the run's ema_sweep.json.

    Raises ValueError for a length outside (0, 0.2887), a run without snapshots or without held-out images.
    """
    plans = [plan_synthesis(run, length, step) for length in lengths]
    opened = open_run(run, device, progress)
    final = opened.final_loss()
    rows = []
    for plan in tqdm(plans, "sweep", unit="length", disable=not progress, leave=False):
        opened.load(plan.tensors())
        rows.append(Row(plan.length, plan.error, opened.loss()))
    best = min(rows, key=lambda row: row.loss if math.isfinite(row.loss) else math.inf)
    result = Sweep(plans[0].step, opened.measure, rows, best.length, final)
    write_json(asdict(result), run / SWEEP_FILE)
    return result


def write_average(
    run: Path, length: float, step: int | None, out: Path | None, device: str | None, progress: bool
) -> tuple[Path, str]:
    """Write a complete model folder with the average of a length at `step` (None: the newest snapshot).

    Returns the folder, and a line on its model card.
    It goes into `out`, by default RUN/ema-0.100 or, with a step, RUN/ema-0.100-step_00000500. Its ema.json holds the
    length, the step and the error of the profile.
    Raises ValueError for a length outside (0, 0.2887), a run without snapshots, a step without one.
    """
    plan = plan_synthesis(run, length, step)
    if out is None:
        out = run / (f"ema-{length:.3f}" if step is None else f"ema-{length:.3f}-step_{step:08d}")
    refuse_run(out, "--out")
    opened = open_run(run, device, progress)
    opened.load(synthesise(run, length, plan.step))
    opened.save(out)
    # With the config, `latentdiff evaluate` finds the data.
    write_text((run / "config.yaml").read_text(encoding="utf-8"), out / "config.yaml")
    write_json({"length": length, "step": plan.step, "profile_error": plan.error}, out / "ema.json")
    weights = f"the averages (`latentdiff ema`, length {length:g})"
    return out, write_exported_card(Copy(out, out.resolve().name, plan.step, weights), run, None, None)


def open_run(run: Path, device: str | None, progress: bool) -> "VAERun | UNetRun":
    """A run of either stage, by its config.yaml. Raises ValueError if it is no run or the device can't be used."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a training run: it has no config.yaml")
    chosen = choose_device(device)
    config = load_run_config(path)
    if isinstance(config, UNetTrainingConfig):
        return UNetRun(run, config, chosen, progress)
    return VAERun(run, config, chosen, progress)


class VAERun:
    """A run of stage 1, whose autoencoder can be measured and written with other weights."""

    measure = "held-out MSE"

    def __init__(self, run: Path, config: VAETrainingConfig, device: torch.device, progress: bool) -> None:
        self.run, self.config, self.device, self.progress = run, config, device, progress

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Make the autoencoder as it is in training, with `averages` as its trained weights."""
        self.vae = initial_autoencoder(self.config)
        load_trained(self.vae, averages, str(self.run / SNAPSHOTS))
        self.vae.eval().to(self.device)

    def loss(self) -> float:
        """The MSE of the reconstructions of the held-out images."""
        return self._mse(self.vae)

    def final_loss(self) -> float | None:
        """The same for the run's final autoencoder, whose latent scale does not change reconstructions."""
        if not (self.run / "config.json").is_file():
            return None
        return self._mse(AutoencoderKL.from_pretrained(self.run).to(self.device))

    def save(self, out: Path) -> None:
        """Write the autoencoder's folder, with its own latent scale, measured over the training images."""
        batches = self._images[0].batches(self.config.validation.batch_size)
        scale_latents(self.vae, self.config, batches, Accelerator())
        self.vae.save_pretrained(out)

    def _mse(self, vae: AutoencoderKL) -> float:
        held_out = _some(self._images[1])
        return validate_vae(vae, held_out, self.config.validation.batch_size)["mse"]

    @cached_property
    def _images(self) -> tuple[CaptionedImages, CaptionedImages]:
        config = self.config
        return open_run_images(config, config.model, progress=self.progress)


class UNetRun:
    """A finished run of stage 2, whose pipeline can be measured and written with other weights."""

    measure = "validation loss"

    def __init__(self, run: Path, config: UNetTrainingConfig, device: torch.device, progress: bool) -> None:
        self.run, self.config, self.device, self.progress = run, config, device, progress
        if config.trains_adapters:
            raise ValueError(f"{run} trained LoRA adapters, of which no other averages can be made")
        self.pipeline = LatentDiffusionPipeline.from_pretrained(run).to(device)
        self.trains_text = config.trains_text_encoder
        text_encoder = self.pipeline.text_encoder if self.trains_text else None
        self.model = TextConditionedUNet(self.pipeline.unet, text_encoder)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Replace the trained weights of the run's pipeline by `averages`."""
        load_strictly(self.model, averages, str(self.run / SNAPSHOTS))
        self.model.to(self.device)

    @torch.no_grad()
    def loss(self) -> float:
        """The validation loss, as in training but in float32."""
        latents, conditions = self._held_out
        loss = validation_loss(
            self.model.eval(),
            self.pipeline.schedule,
            latents,
            lambda indices: conditions[indices],
            self.config.validation.batch_size,
            self.config.validation.bins,
        )
        return loss.mean

    def final_loss(self) -> float:
        """The same for the run's final model; before any `load`."""
        return self.loss()

    def save(self, out: Path) -> None:
        """Write the whole pipeline."""
        self.pipeline.save_pretrained(out)

    @cached_property
    def _held_out(self) -> tuple[list[Tensor], Tensor]:
        """The held-out images' latents [C, h, w] and conditions: input_ids, or the context of a frozen encoder."""
        config, vae, batch_size = self.config, self.pipeline.vae, self.config.validation.batch_size
        images = _some(open_run_images(config, vae.config, self.progress)[1])
        images = images.some(config.validation.max_images or len(images))
        ids = self.pipeline.tokenizer(images.captions).to(self.device)
        with torch.no_grad():
            if not self.trains_text:
                ids = torch.cat([self.pipeline.text_encoder(part) for part in ids.split(batch_size)])
        return encode_means(vae, images, batch_size), ids


def _some(held_out: CaptionedImages) -> CaptionedImages:
    if len(held_out) == 0:
        raise ValueError("a sweep measures the loss on held-out images, but data.holdout is 0")
    return held_out

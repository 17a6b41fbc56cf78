"""Stage 2's validation loss by noise level and its sample grids, on fixed images, noise and timesteps.

Every process makes the same number of equally large model calls, since a sharded model needs all processes for each
call; the results are the same on every process.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentdiff.config import UNetTrainingConfig, UNetValidationConfig
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.data.latent_cache import encode_means
from latentdiff.data.shapes import Shape
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.distributed import chunks, gather_rows, shared_indices
from latentdiff.figures.grids import image_grid
from latentdiff.formats.files import PNG_KEY
from latentdiff.images import IMAGE_MODES
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.pipeline import LatentDiffusionPipeline, NonFiniteError
from latentdiff.randomness import Stream, generator, normal
from latentdiff.training.ema import EMA
from latentdiff.training.run import Run
from latentdiff.training.unet_inputs import UNetInputs

# The validation noise is the same in every run, for every seed, so that losses compare between runs.
VALIDATION_SEED = 0
MIN_REPEATS = 4  # evaluations per image
MIN_EVALUATIONS = 8  # per bin of timesteps


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: the loss


@dataclass(frozen=True)
class BinnedLoss:
    """A validation loss by noise level: bin b holds the timesteps edges[b] .. edges[b + 1] - 1.

    baseline: the loss of the best predictor that knows the bin but not the noisy latents, which returns the mean target
    of each channel over the bin's evaluations. A network whose loss is near it has learned nothing there. For epsilon
    it is about 1; for v and the clean latents it depends on the variance of the data.
    """

    edges: tuple[int, ...]  # one more than bins
    loss: tuple[float, ...]
    baseline: tuple[float, ...]
    mean: float  # over all evaluations
    baseline_mean: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """Named numbers: prefix/loss, prefix/loss_bin_00, ..., prefix/baseline, prefix/baseline_bin_00, ..."""
        return {
            **_by_bin(f"{prefix}/loss", self.mean, self.loss),
            **_by_bin(f"{prefix}/baseline", self.baseline_mean, self.baseline),
        }


def gap_metrics(train: BinnedLoss, held_out: BinnedLoss) -> dict[str, float]:
    """Held-out minus training loss, as validation/gap, validation/gap_bin_00, ...

    Both must be measured in the same way, on images that the model was and was not trained on. The gap is near zero (up
    to the difference between the images) while the model learns what they share; a growing gap means overfitting: the
    model memorises the training images.
    """
    assert train.edges == held_out.edges
    gaps = [b - a for a, b in zip(train.loss, held_out.loss, strict=True)]
    return _by_bin("validation/gap", held_out.mean - train.mean, gaps)


def _by_bin(name: str, mean: float, values: Sequence[float]) -> dict[str, float]:
    digits = max(2, len(str(len(values) - 1)))
    return {name: mean, **{f"{name}_bin_{b:0{digits}}": value for b, value in enumerate(values)}}


@torch.no_grad()
def validation_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    latents: Tensor | Sequence[Tensor],
    condition: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    bins: int,
    accelerator: Accelerator | None = None,
) -> BinnedLoss:
    """The loss on N >= 1 latents [C, h, w] with fixed noise at fixed timesteps, by noise level.

    Latents may be of several shapes: each batch is of one, and every image counts the same. The loss is the mean
    squared error for any training objective, so that runs with different objectives compare.
    condition(indices): the conditioning of those images. There are at most as many bins as timesteps, of equal widths
    (up to one timestep), and evaluations are spread evenly over the timesteps.
    """
    assert len(latents) > 0
    plan = _plan(len(latents), schedule.num_train_timesteps, bins)
    channels = latents[0].shape[0]
    table = torch.empty(len(plan.images), 1 + 2 * channels, dtype=torch.float64)
    for group in _by_shape(plan, latents):
        rows = []
        for places in chunks(shared_indices(len(group), accelerator), batch_size):
            batch = [group[place] for place in places]
            images = [plan.images[i] for i in batch]
            clean = torch.stack([latents[image] for image in images])
            noise = torch.cat([_noise(clean.shape[1:], plan.repeats[i], plan.images[i]) for i in batch]).to(clean)
            timesteps = plan.timesteps[batch].to(clean.device)
            loss = diffusion_loss(model, schedule, clean, condition(images), noise, timesteps)
            target = schedule.target(clean, noise, timesteps).float()
            variance, mean = torch.var_mean(target, dim=(2, 3), correction=0)
            rows.append(torch.cat([loss[:, None], mean, variance], dim=1))
        table[group] = gather_rows(torch.cat(rows), len(group), accelerator).double()
    return _binned(plan, *table.split([1, channels, channels], dim=1))


def _noise(shape: Sequence[int], repeat: int, image: int) -> Tensor:
    return normal(shape, VALIDATION_SEED, Stream.NOISE, repeat, [image])


@dataclass(frozen=True)
class _Plan:
    """The evaluations of a validation loss: image, index of its noise, and timestep [E]."""

    edges: tuple[int, ...]
    images: list[int]
    repeats: list[int]
    timesteps: Tensor


def evaluations_per_image(num_images: int, num_timesteps: int, bins: int) -> int:
    """How often a validation loss evaluates each of so many images."""
    narrowest = num_timesteps // min(bins, num_timesteps)
    return max(MIN_REPEATS, -(-MIN_EVALUATIONS * num_timesteps // (narrowest * num_images)))


def _plan(num_images: int, num_timesteps: int, bins: int) -> _Plan:
    """Each image is evaluated once in each of several equal blocks of the schedule.

    In a block the images have evenly spaced timesteps in a fixed random order, so that sorted images do not give each
    bin its own kind of image.
    """
    bins = min(bins, num_timesteps)
    edges = tuple(b * num_timesteps // bins for b in range(bins + 1))
    repeats = evaluations_per_image(num_images, num_timesteps, bins)
    orders = [generator(VALIDATION_SEED, Stream.TIMESTEPS, repeat) for repeat in range(repeats)]
    images = torch.cat([torch.randperm(num_images, generator=order) for order in orders]).tolist()
    count = len(images)
    timesteps = torch.tensor([(2 * i + 1) * num_timesteps // (2 * count) for i in range(count)])
    return _Plan(edges, images, [i // num_images for i in range(count)], timesteps)


def _by_shape(plan: _Plan, latents: Tensor | Sequence[Tensor]) -> list[list[int]]:
    """The evaluations of the latents of each shape, in order."""
    groups: dict[torch.Size, list[int]] = {}
    for evaluation, image in enumerate(plan.images):
        groups.setdefault(latents[image].shape, []).append(evaluation)
    return list(groups.values())


def _binned(plan: _Plan, loss: Tensor, target_mean: Tensor, target_variance: Tensor) -> BinnedLoss:
    """From losses [E, 1], and means and variances of the targets over each latent [E, C], all float64."""
    bin_of = torch.bucketize(plan.timesteps, torch.tensor(plan.edges[1:]), right=True)
    losses, baselines, counts = [], [], []
    for b in range(len(plan.edges) - 1):
        members = bin_of == b
        constant = target_mean[members].mean(dim=0)
        baseline = target_variance[members] + (target_mean[members] - constant).square()
        losses.append(loss[members].mean().item())
        baselines.append(baseline.mean().item())
        counts.append(members.sum().item())
    baseline_mean = float(np.average(baselines, weights=counts))
    return BinnedLoss(plan.edges, tuple(losses), tuple(baselines), loss.mean().item(), baseline_mean)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: images


def prompts_at(step: int, config: UNetValidationConfig) -> list[str]:
    """The prompts of the sample grid at `step`: `num_samples` of them, cycling through the config's list.

    With fewer samples than prompts each grid continues where the previous one ended; else all use the same.
    """
    prompts = config.prompts
    count = config.num_samples or len(prompts)
    earlier = -(-step // config.sample_every) - 1  # grids before this one; the last one may come early
    first = earlier * count if count < len(prompts) else 0
    return [prompts[(first + i) % len(prompts)] for i in range(count)]


def generate_validation_images(
    pipeline: LatentDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    shape: Shape,
    batch_size: int,
    accelerator: Accelerator | None = None,
) -> list[Image.Image]:
    """Generate an image for each prompt, which is read as a caption is in training. Same result on every process.

    shape: height and width, pixels. Image i has seed + i.
    """
    height, width = shape
    pixels = []
    for indices in chunks(shared_indices(len(prompts), accelerator), batch_size):
        try:
            images = pipeline(
                prompt_embeds=pipeline.encode_captions([prompts[i] for i in indices]),
                seed=[seed + i for i in indices],
                height=height,
                width=width,
                progress=False,
            ).images
        except NonFiniteError as error:  # this must not end the run, nor leave the other processes waiting
            warnings.warn(f"no sample images: {error}", stacklevel=2)
            mode = IMAGE_MODES[pipeline.vae.config.out_channels]
            images = [Image.new(mode, (width, height), "grey")] * len(indices)
        pixels.append(torch.stack([torch.from_numpy(np.array(image)) for image in images]))
    gathered = gather_rows(torch.cat(pixels).to(pipeline.device), len(prompts), accelerator)
    return [Image.fromarray(image) for image in gathered.numpy()]


# ----------------------------------------------------------------------------------------------------------------------
# Both, when they are due


class UNetEvaluation:
    """Before a step: the validation loss and the sample grid where they are due, with the averaged weights.

    The run's best weights are chosen by the validation loss.

    The loss is also measured on as many training images as are held out: a model that is much better on those
    memorises them.
    """

    def __init__(
        self,
        config: UNetTrainingConfig,
        inputs: UNetInputs,
        images: CaptionedImages,
        held_out: CaptionedImages,
        pipeline_of: Callable[[TextConditionedUNet], LatentDiffusionPipeline],
        accelerator: Accelerator,
    ) -> None:
        """pipeline_of(model): the pipeline around a model with the averaged weights."""
        self.config, self.inputs, self.pipeline_of, self.accelerator = config, inputs, pipeline_of, accelerator
        if config.validation.max_images is not None:
            held_out = held_out.some(config.validation.max_images)
        sets = [images.some(len(held_out)), held_out] if len(held_out) else []
        batch_size = config.validation.batch_size
        self.sets = [(encode_means(inputs.vae, one, batch_size), inputs.tokenizer(one.captions)) for one in sets]

    def __call__(self, run: Run, ema: EMA, model: TextConditionedUNet) -> None:
        """Log what is due at the run's step. Every process calls this."""
        validation, step = self.config.validation, run.state.step
        validate = len(self.sets) > 0 and run.due(validation.every)
        sample = step > 0 and run.due(validation.sample_every)
        if not (validate or sample):
            return
        with ema.applied(model) as averaged, eval_mode(averaged), self.accelerator.autocast():
            assert isinstance(averaged, TextConditionedUNet)
            if validate:
                scores = self.validate(averaged)
                run.log.write(step, scores)
                if run.state.best is not None:
                    run.state.best.offer(step, scores["validation/loss"], averaged)
            if sample:
                prompts = prompts_at(step, validation)
                samples = generate_validation_images(
                    self.pipeline_of(averaged),
                    prompts,
                    validation.seed,
                    self.config.data.shape,
                    validation.batch_size,
                    self.accelerator,
                )
                grid = image_grid(samples)
                grid.info[PNG_KEY] = json.dumps({"prompts": prompts})
                run.log.write_image(step, grid)

    def validate(self, model: TextConditionedUNet) -> dict[str, float]:
        """The loss on held-out images by noise level, and how much lower it is on training images."""

        def loss_on(latents: Sequence[Tensor], ids: Tensor) -> BinnedLoss:
            return validation_loss(
                model,
                self.config.diffusion,
                latents,
                lambda indices: self.inputs.encode(ids[indices].to(self.accelerator.device)),
                self.config.validation.batch_size,
                self.config.validation.bins,
                self.accelerator,
            )

        seen, unseen = (loss_on(*one) for one in self.sets)
        return unseen.metrics("validation") | gap_metrics(seen, unseen)

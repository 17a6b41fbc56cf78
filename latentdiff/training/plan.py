"""What a training will take before it is started: parameters, FLOPs, memory, disk, and on this machine time.

The first four are counted with fake tensors, which have shapes and no values, so no GPU and little memory is needed.
Time is measured: a few optimiser steps of the real networks, and forward passes.
"""

import gc
import math
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.config import AutoencoderKLConfig, UNetTrainingConfig, VAETrainingConfig, load_config, stage_of
from latentdiff.data.captioned_images import CaptionedImages, open_run_images
from latentdiff.devices import choose_precision
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.evaluation.inspection import COMPOSED, MEMORISED
from latentdiff.formats.diffusers_folder import autoencoder_folder, read_config
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import PixelSpaceConfig
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.training.ema import EMA, trainable
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.unet_evaluation import evaluations_per_image
from latentdiff.training.unet_model import with_latent_space
from latentdiff.training.vae_losses import reconstruction_error

WARM_UP = 2  # steps that are not timed: the first ones choose kernels and fill caches
Config = VAETrainingConfig | UNetTrainingConfig
VAEConfig = AutoencoderKLConfig | PixelSpaceConfig


@dataclass(frozen=True)
class Counts:
    """What needs no measurement; bytes are those of one process.

    parameters: by part. flops: of one image, forward and backward. peak_bytes: the most that is in memory in an
    optimiser step: weights, their averages, the optimiser's state, gradients and activations. copies_bytes: in main
    memory, of what is written while the training goes on. checkpoint_bytes and cache_bytes: on the disk, of one
    checkpoint and of the latent cache.
    """

    parameters: Mapping[str, int]
    flops: int
    weights_bytes: int
    averages_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    copies_bytes: int
    checkpoint_bytes: int
    cache_bytes: int

    @property
    def step_bytes(self) -> int:
        """Of activations and gradients, at the moment when most is in memory."""
        return self.peak_bytes - self.weights_bytes - self.averages_bytes - self.optimizer_bytes


@dataclass(frozen=True)
class Speed:
    """Seconds, measured. step: an optimiser step (stage 1: on crops); whole_step: on whole images, of stage 1.

    image: the network's forward pass without gradient, for each image; encoded: that of the autoencoder's encoder.
    """

    step: float
    whole_step: float
    image: float
    encoded: float


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    size = self._known[storage] = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


# ----------------------------------------------------------------------------------------------------------------------
# The networks of a config


@dataclass(frozen=True)
class _Stage:
    """A stage's networks, on the CPU, and what is done with them on a device.

    loss(n): of a micro-batch of n images; forward(n): the network on n images.
    """

    parts: Mapping[str, nn.Module]
    model: nn.Module
    loss: Callable[[int], Tensor]
    whole_loss: Callable[[int], Tensor]
    forward: Callable[[int], object]


def vae_config_of(config: Config, place: Path) -> VAEConfig:
    """The config of the autoencoder that a run trains, or trains on. place: of the config's file.

    Before stage 1 has run, that of the stage 1 config beside it. Raises ValueError if there is neither.
    """
    if isinstance(config, VAETrainingConfig):
        return config.model
    if config.vae is None:
        return PixelSpaceConfig(channels=config.model.in_channels)
    if Path(config.vae).expanduser().is_dir():
        folder = autoencoder_folder(Path(config.vae).expanduser())
        if (folder / "config.json").is_file():
            return AutoencoderKLConfig.from_diffusers(read_config(folder / "config.json", "AutoencoderKL"), str(folder))
    beside = place.parent / "vae.yaml"
    if beside.is_file() and stage_of(beside) == "vae":
        stage_1 = load_config(VAETrainingConfig, beside)
        if Path(stage_1.output.folder) == Path(config.vae):
            return stage_1.model
    raise ValueError(f"{config.vae} has no autoencoder yet; train it first, or put the config of stage 1 in {beside}")


def completed(config: Config, vae: VAEConfig) -> Config:
    """The config with what follows from the autoencoder."""
    if isinstance(config, VAETrainingConfig):
        return config
    return with_latent_space(config, vae, "pixel space" if config.vae is None else f"the autoencoder in {config.vae}")


def _stage(config: Config, vae: VAEConfig, device: torch.device) -> _Stage:
    if isinstance(config, VAETrainingConfig):
        return _stage_1(config, device)
    return _stage_2(config, vae, device)


def _stage_1(config: VAETrainingConfig, device: torch.device) -> _Stage:
    model = AutoencoderKL(config.model)
    model.enable_gradient_checkpointing(config.train.gradient_checkpointing)

    def pixels(n: int, *shape: int) -> Tensor:
        return torch.zeros(n, config.model.in_channels, *shape, device=device)

    def loss(images: Tensor) -> Tensor:
        reconstruction, moments = model(images, None)
        error = reconstruction_error(config.loss.reconstruction, reconstruction, images).mean()
        return error + config.loss.kl_weight * model.unit_posterior(moments.float()).kl().mean()

    crop = config.train.crop_size
    shape = config.data.shape if crop is None else (crop, crop)
    return _Stage(
        {"autoencoder": model},
        model,
        lambda n: loss(pixels(n, *shape)),
        lambda n: loss(pixels(n, *config.data.shape)),
        lambda n: model(pixels(n, *config.data.shape), None),
    )


def _stage_2(config: UNetTrainingConfig, vae: VAEConfig, device: torch.device) -> _Stage:
    unet = UNet(config.model)
    unet.enable_gradient_checkpointing(config.train.gradient_checkpointing)
    text, length = None, 77
    if config.text.config is not None:
        text = TextEncoder.from_config(config.text.config, 0)
        length = text.max_length
    model = TextConditionedUNet(unet, text)
    grid = [side // vae.downsampling for side in config.data.shape]

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.zeros(n, config.model.in_channels, *grid, device=device)
        timesteps = torch.zeros(n, dtype=torch.long, device=device)
        if text is not None:
            return latents, torch.zeros(n, length, dtype=torch.long, device=device), timesteps
        return latents, torch.zeros(n, length, config.model.cross_attention_dim, device=device), timesteps

    def loss(n: int) -> Tensor:
        latents, condition, timesteps = inputs(n)
        return diffusion_loss(model, config.diffusion, latents, condition, latents, timesteps, config.loss).mean()

    def forward(n: int) -> object:
        latents, condition, timesteps = inputs(n)
        return model(latents, timesteps, condition)

    parts = {"UNet": unet} if text is None else {"UNet": unet, "text encoder": text}
    return _Stage(parts, model, loss, loss, forward)


def _micro_batch(config: Config) -> int:
    """Images of one forward pass of one process; of `auto` the whole batch."""
    micro = config.train.micro_batch_size
    return micro if isinstance(micro, int) else config.train.batch_size


def _autocast(config: Config, device: torch.device) -> AbstractContextManager[object]:
    kind = choose_precision(config.train.precision, device).mixed_precision
    if kind == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if kind == "bf16" else torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Counting and measuring


def counts(config: Config, vae: VAEConfig, images: int, device: torch.device) -> Counts:
    """Count parameters, FLOPs, memory and disk of a completed config. images: of the training set.

    The perceptual and the adversarial loss of stage 1 and a pretrained text encoder are not counted.
    device: where it will run, for its precision; it need not be there.
    """
    micro = _micro_batch(config)
    accumulated = min(2, -(-config.train.batch_size // micro))  # gradients of the first stay during the second
    memory = LiveMemory()
    with _autocast(config, device) if device.type == "cpu" else torch.autocast("cpu", torch.bfloat16), memory:
        with FakeTensorMode(allow_non_fake_inputs=True):
            stage = _stage(config, vae, torch.device("cpu"))
            trained = sum(p.numel() * 4 for p in trainable(stage.model).values())
            weights = memory.now
            ema = EMA(stage.model)
            copies = int(config.publishes_best) + (len(config.ema.snapshot_lengths) if config.ema.snapshot_every else 0)
            averages = memory.now - weights + copies * trained
            optimizer = build_optimizer(stage.model, config.optimizer)
            flops = 0
            whole = isinstance(config, VAETrainingConfig) and config.train.whole_image_steps > 0
            for _ in range(2):  # the optimiser makes its state in the first step
                for _ in range(accumulated):
                    with FlopCounterMode(display=False) as counter:
                        (stage.whole_loss if whole else stage.loss)(micro).backward()
                    flops = counter.get_total_flops() // micro
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            gc.collect()  # what only reference cycles keep alive
            state = memory.now - weights - sum(p.numel() * 4 for p in ema.average.values())
            parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in stage.parts.items()}
            peak = memory.peak + copies * trained
    cached = 0
    if isinstance(config, UNetTrainingConfig) and config.train.cache_latents:
        views = 2 if config.data.flip > 0 else 1
        values = vae.latent_channels if config.is_pixel_space else 2 * vae.latent_channels * 4  # bytes at a place
        height, width = config.data.shape
        cached = images * views * values * (height // vae.downsampling) * (width // vae.downsampling)
        if config.text.pretrained is not None:
            cached += images * 77 * config.model.cross_attention_dim * 4
    checkpoint = weights + averages + state
    copied = checkpoint - int(config.publishes_best) * trained  # the best weights need no copy
    if config.ema.snapshot_every:
        copied += len(config.ema.snapshot_lengths) * trained
    return Counts(parameters, flops, weights, averages, state, peak, copied, checkpoint, cached)


def flops_by_step(config: Config, vae: VAEConfig) -> Callable[[int], int]:
    """FLOPs of an image in training, forward and backward, by the step; counted when it is first asked for.

    What gradient checkpointing computes again is not counted, and what `counts` leaves out is not either.
    config: a completed one.
    """
    counted = cache(partial(_flops_of_image, config, vae))

    def at(step: int) -> int:
        is_whole = isinstance(config, VAETrainingConfig) and step >= config.train.steps - config.train.whole_image_steps
        return counted(is_whole)

    return at


def _flops_of_image(config: Config, vae: VAEConfig, whole: bool) -> int:
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage = _stage(config.model_copy(update={"train": train}), vae, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            (stage.whole_loss if whole else stage.loss)(1).backward()
    return counter.get_total_flops()


def measure(config: Config, vae: VAEConfig, device: torch.device, seconds: float = 4.0) -> Speed:
    """Time steps and forward passes of a completed config on this machine, each for about so many seconds.

    Where a micro-batch takes longer than that, a smaller one is timed and multiplied.
    """
    stage = _stage(config, vae, device)
    stage.model.to(device)
    optimizer, ema = build_optimizer(stage.model, config.optimizer), EMA(stage.model)
    batch = config.train.batch_size

    def step_on(loss: Callable[[int], Tensor]) -> Callable[[int], None]:
        def step(n: int) -> None:
            with _autocast(config, device):
                value = loss(n)
            value.backward()
            torch.nn.utils.clip_grad_norm_(stage.model.parameters(), config.optimizer.max_grad_norm or torch.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(stage.model, 0.99)

        return step

    @torch.no_grad()
    def forward(n: int) -> None:
        with _autocast(config, device):
            stage.forward(n)

    micro = _micro_batch(config)
    step = _timed(step_on(stage.loss), micro, seconds, device) * batch
    whole = step
    if isinstance(config, VAETrainingConfig) and config.train.whole_image_steps:
        whole = _timed(step_on(stage.whole_loss), micro, seconds, device) * batch
    image = _timed(forward, config.validation.batch_size, seconds / 2, device)
    encoded = 0.0
    if isinstance(vae, AutoencoderKLConfig):
        encoder = AutoencoderKL(vae).to(device)
        pixels = torch.zeros(config.validation.batch_size, vae.in_channels, *config.data.shape, device=device)

        @torch.no_grad()
        def encode(n: int) -> None:
            with _autocast(config, device):
                encoder.encode(pixels[:n])

        encoded = _timed(encode, len(pixels), seconds / 2, device)
    return Speed(step, whole, image, encoded)


def _timed(run: Callable[[int], None], most: int, seconds: float, device: torch.device) -> float:
    """Seconds for each of `most` items that are processed at once, or of fewer if these take too long."""

    def once(n: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(n)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    n = 1
    once(1)
    while n < most and once(n) * 2 < seconds / 2:
        n = min(2 * n, most)
    for _ in range(WARM_UP - 1):
        once(n)
    times: list[float] = []
    while not times or sum(times) < seconds:
        times.append(once(n))
    return min(times) / n if len(times) < 3 else sorted(times)[len(times) // 2] / n


def seconds_of(config: Config, speed: Speed, images: CaptionedImages, held_out: CaptionedImages) -> Mapping[str, float]:
    """How long each part of a training takes, by what it is."""
    train, validation = config.train, config.validation
    validations = train.steps // validation.every + 1
    if isinstance(config, VAETrainingConfig):
        whole = config.train.whole_image_steps
        shown = len(held_out) or len(images)
        return {
            "steps": (train.steps - whole) * speed.step + whole * speed.whole_step,
            "validation": validations * (len(held_out) + config.validation.images) * speed.image,
            "the scale of the latents and the report": len(images) * speed.encoded + shown * speed.image,
        }
    assert isinstance(config, UNetTrainingConfig)
    measured = min(len(held_out), config.validation.max_images or len(held_out))
    each = (
        evaluations_per_image(measured, config.diffusion.num_train_timesteps, config.validation.bins) if measured else 0
    )
    samples = config.validation.num_samples or len(config.validation.prompts)
    passes = config.validation.num_inference_steps * (1 if config.validation.guidance_scale == 1 else 2)
    views = 2 if config.data.flip > 0 else 1
    cached = len(images) * views * speed.encoded if config.train.cache_latents else 0.0
    return {
        "steps": train.steps * speed.step,
        "validation": validations * 2 * measured * each * speed.image,  # as many training images
        "samples": train.steps // config.validation.sample_every * samples * passes * speed.image,
        "encoding the images": cached + 2 * measured * speed.encoded,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    """What a training will take. images, held_out: how many there are. speed, seconds: None if it was not measured."""

    config: Config
    device: torch.device
    images: int
    held_out: int
    counts: Counts
    speed: Speed | None
    seconds: Mapping[str, float] | None

    def text(self) -> str:
        """Lines for the terminal."""
        config, found, train = self.config, self.counts, self.config.train
        parts = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in found.parameters.items())
        lines = [
            ("images", f"{self.images:,} to train on, {self.held_out:,} held out"),
            ("training", f"{train.steps:,} steps of {train.batch_size} images: {self.epochs:.3g} epochs"),
            ("parameters", parts),
            ("arithmetic", f"{found.flops / 1e9:.3g} GFLOPs for an image, forward and backward"),
            ("memory", self._memory()),
            ("disk", self._disk()),
        ]
        if self.speed is not None and self.seconds is not None:
            rate = train.batch_size / self.speed.step
            lines.append(
                ("speed", f"{rate:.3g} images/s on this machine ({self.device.type}), {self.speed.step:.3g} s a step")
            )
            spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items() if seconds >= 1)
            lines.append(("time", f"about {duration(sum(self.seconds.values()))}: {spent}"))
        lines.append(("to expect", expectation(self.images)))
        notes = {"adversarial": "the adversarial loss", "perceptual": "the perceptual loss"}
        missing = [text for key, text in notes.items() if getattr(config.loss, key, None) is not None]
        if isinstance(config, UNetTrainingConfig) and config.text.pretrained is not None:
            missing.append("the frozen text encoder")
        if missing:
            lines.append(("not counted", " and ".join(missing)))
        return "\n".join(f"  {name:12}{text}" for name, text in lines)

    @property
    def epochs(self) -> float:
        """How often an image is trained on."""
        return self.config.train.steps * self.config.train.batch_size / max(1, self.images)

    def _memory(self) -> str:
        found, on_cpu = self.counts, self.device.type == "cpu"
        text = (
            f"{_size(found.peak_bytes + on_cpu * found.copies_bytes)} besides the libraries: weights "
            f"{_size(found.weights_bytes)}, averages {_size(found.averages_bytes)}, optimiser "
            f"{_size(found.optimizer_bytes)}, activations and gradients {_size(found.step_bytes)}"
        )
        copies = f"the copy of a checkpoint that is being written {_size(found.copies_bytes)}"
        return f"{text}, {copies}" if on_cpu else f"{text}; in main memory {copies}"

    def _disk(self) -> str:
        kept = self.config.output.keep
        text = f"{kept} checkpoints of {_size(self.counts.checkpoint_bytes)}"
        return f"{text}, latent cache {_size(self.counts.cache_bytes)}" if self.counts.cache_bytes else text


def plan(path: Path, config: Config, device: torch.device, measured: bool, progress: bool) -> Plan:
    """What the training of a config will take. path: of its file. measured: time it on the device too."""
    vae = vae_config_of(config, path)
    config = completed(config, vae)
    images, held_out = open_run_images(config, vae, progress)
    speed = measure(config, vae, device) if measured else None
    seconds = None if speed is None else seconds_of(config, speed, images, held_out)
    return Plan(config, device, len(images), len(held_out), counts(config, vae, len(images), device), speed, seconds)


def expectation(images: int) -> str:
    """What a number of training images lets expect, from what was measured with the drawings of this project."""
    if images <= MEMORISED:
        return f"{images:,} images: copies of them; new combinations need hundreds or thousands of images"
    if images < COMPOSED:
        return f"{images:,} images: many samples near to training images; new combinations need thousands of images"
    return f"{images:,} images: new combinations of what their captions name, where these name it"


def _size(count: float) -> str:
    units = ("bytes", "KB", "MB", "GB")
    power = min(len(units) - 1, int(math.log10(max(1, count))) // 3)
    return f"{count / 1000**power:.3g} {units[power]}"


def duration(seconds: float) -> str:
    """Such as "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

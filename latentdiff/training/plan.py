"""What a training will take before it is started: parameters, FLOPs, memory, disk, and on this machine time.

The first four are counted with fake tensors, which have shapes and no values, so no GPU and little memory is needed.
Time is measured: a few optimiser steps of the real networks, and forward passes.
"""

import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.config import (
    AutoencoderKLConfig,
    LoRAConfig,
    UNetConfig,
    UNetTrainingConfig,
    VAETrainingConfig,
    load_config,
    stage_of,
)
from latentdiff.data.captioned_images import CaptionedImages, open_run_images
from latentdiff.devices import choose_precision, peak_memory, synchronize
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.evaluation import autoencoder
from latentdiff.evaluation.inspection import COMPOSED, MEMORISED
from latentdiff.figures.charts import loss_figure, rendered
from latentdiff.formats.diffusers_folder import autoencoder_folder
from latentdiff.models.autoencoder import AutoencoderKL, read_autoencoder_config
from latentdiff.models.lora import attach_new, matching_layers
from latentdiff.models.pixel_space import PixelSpaceConfig
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder, config_to_train
from latentdiff.models.unet import UNet
from latentdiff.training.adapters import ADAPTER
from latentdiff.training.computing import computing_with, memory_format
from latentdiff.training.ema import EMA, trainable
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.unet_evaluation import evaluations_per_image
from latentdiff.training.unet_model import with_latent_space
from latentdiff.training.vae_evaluation import validate_vae
from latentdiff.training.vae_losses import reconstruction_error

CHARTS = 4  # of a report
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

    For each image: forward: the network without gradient; validated and reported: the validation of stage 1 and its
    report; encoded and decoded: by the autoencoder. chart: of the charts of a report.
    peak_bytes: the most that this process had in memory meanwhile, libraries and images included; of a GPU what tensors
    took there. None where it is not known.
    """

    step: float
    whole_step: float
    forward: float = 0.0
    validated: float = 0.0
    reported: float = 0.0
    encoded: float = 0.0
    decoded: float = 0.0
    chart: float = 0.0
    peak_bytes: int | None = None


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else torch.compile does nothing under this mode."""
        return True

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
    """A stage's networks and what is done with them, on a device.

    loss(n): of a micro-batch of n images; forward(n): the network on n images, with its float32 weights.
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
    given = Path(config.vae).expanduser()
    if given.is_file() or (given.is_dir() and (autoencoder_folder(given) / "config.json").is_file()):
        return read_autoencoder_config(given)
    beside = place.parent / "vae.yaml"
    if beside.is_file() and stage_of(beside) == "vae":
        stage_1 = load_config(VAETrainingConfig, beside)
        if Path(stage_1.output.folder) == Path(config.vae):
            return stage_1.model
    if given.is_dir():
        raise ValueError(
            f"{config.vae} has no autoencoder yet; train it first, or put the config of stage 1 in {beside}"
        )
    try:
        return read_autoencoder_config(config.vae, "vae")
    except ValueError as error:
        raise ValueError(f"{error}, or put the config of stage 1 in {beside}") from None


def completed(config: Config, vae: VAEConfig) -> Config:
    """The config with what follows from the autoencoder."""
    if isinstance(config, VAETrainingConfig):
        return config
    return with_latent_space(config, vae, "pixel space" if config.vae is None else f"the autoencoder in {config.vae}")


def _stage(config: Config, vae: VAEConfig, device: torch.device, **compiling: Any) -> _Stage:
    """compiling: options of torch.compile; without any, nothing is compiled."""
    if isinstance(config, VAETrainingConfig):
        return _stage_1(config, device, **compiling)
    return _stage_2(config, vae, device, **compiling)


def _stage_1(config: VAETrainingConfig, device: torch.device, **compiling: Any) -> _Stage:
    model = AutoencoderKL(config.model)
    model.enable_gradient_checkpointing(config.train.gradient_checkpointing)
    computing = _computing(model, config, device, **compiling)

    def pixels(n: int, *shape: int) -> Tensor:
        return torch.zeros(n, config.model.in_channels, *shape, device=device)

    def loss(images: Tensor) -> Tensor:
        reconstruction, moments = computing(images, None)
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


def _stage_2(config: UNetTrainingConfig, vae: VAEConfig, device: torch.device, **compiling: Any) -> _Stage:
    unet = _with_adapters(config.model, config.lora, device) if config.trains_adapters else UNet(config.model)
    unet.enable_gradient_checkpointing(config.train.gradient_checkpointing)
    text, length = None, 77
    if config.text.config is not None:
        text = TextEncoder(config_to_train(config.text.config))
        length = text.max_length
    model = TextConditionedUNet(unet, text)
    computing = _computing(model, config, device, **compiling)
    grid = [side // vae.downsampling for side in config.data.shape]

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.zeros(n, config.model.in_channels, *grid, device=device)
        timesteps = torch.zeros(n, dtype=torch.long, device=device)
        if text is not None:
            return latents, torch.zeros(n, length, dtype=torch.long, device=device), timesteps
        # Adapters of a text encoder, which is not here, are reached through the context.
        trained = config.trains_text_encoder
        context = torch.zeros(n, length, config.model.cross_attention_dim, device=device, requires_grad=trained)
        return latents, context, timesteps

    def loss(n: int) -> Tensor:
        latents, condition, timesteps = inputs(n)
        return diffusion_loss(computing, config.diffusion, latents, condition, latents, timesteps, config.loss).mean()

    def forward(n: int) -> object:
        latents, condition, timesteps = inputs(n)
        return model(latents, timesteps, condition)

    parts = {"UNet": unet} if text is None else {"UNet": unet, "text encoder": text}
    return _Stage(parts, model, loss, loss, forward)


def _with_adapters(config: UNetConfig, lora: LoRAConfig, device: torch.device) -> UNet:
    """A UNet with adapters to train, without values. Those of the text encoder are not counted, as it is not itself."""
    assert lora.rank is not None
    with unset_fake_temporarily(), torch.device("meta"):  # peft cannot work with fake tensors
        unet = UNet(config)
        unet.requires_grad_(False)
        if layers := matching_layers(unet, lora.targets):
            attach_new(unet, ADAPTER, layers, lora.rank, lora.used_alpha, torch.Generator())
    unet.to_empty(device=device)
    for parameter in unet.parameters():
        nn.init.constant_(parameter, 0.01)  # what lies in empty memory may be slow to compute with
    return unet


def _computing(model: nn.Module, config: Config, device: torch.device, **compiling: Any) -> nn.Module:
    """What forward and backward pass run through; the model is moved to the device."""
    if device.type != "cpu":  # fake tensors, which are on the CPU, cannot be moved
        model.to(device)
        model.to(memory_format=memory_format(config.train, device))
    train = config.train if compiling else config.train.model_copy(update={"compile": "off"})
    return computing_with(model, train, **compiling)


def _counted_backend() -> dict[str, Any]:
    """torch.compile's own choice of what is kept for the backward pass, without the slow making of kernels."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(module.forward)

    return {
        "backend": aot_autograd(
            fw_compiler=as_it_is,
            bw_compiler=as_it_is,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
    }


def _micro_batch(config: Config) -> int:
    """Images of one forward pass of one process; of `auto` the whole batch."""
    micro = config.train.micro_batch_size
    return micro if isinstance(micro, int) else config.train.batch_size


def _autocast(config: Config, device: torch.device) -> AbstractContextManager[object]:
    kind = choose_precision(config.train.wanted_precision, device).mixed_precision
    if kind == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if kind == "bf16" else torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Counting and measuring


@contextmanager
def _without_values(config: Config) -> Iterator[None]:
    """Fake tensors within the block, which have shapes alone."""
    if isinstance(config, UNetTrainingConfig):
        # Tables of the noise schedule are kept for good, and a later training needs their values.
        nothing, first = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
        diffusion_loss(lambda x, *_: x, config.diffusion, nothing, nothing, nothing, first, config.loss)
        del nothing, first  # the memory of the block is counted
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def counts(config: Config, vae: VAEConfig, images: int, device: torch.device) -> Counts:
    """Count parameters, FLOPs, memory and disk of a completed config. images: of the training set.

    The perceptual and the adversarial loss of stage 1 and a pretrained text encoder are not counted. With train.compile
    it is counted what torch.compile keeps for the backward pass; its kernels need less beside it than counted.
    device: where it will run, for its precision; it need not be there.
    """
    micro = _micro_batch(config)
    accumulated = min(2, -(-config.train.batch_size // micro))  # gradients of the first stay during the second

    def autocast() -> AbstractContextManager[object]:
        return _autocast(config, device) if device.type == "cpu" else torch.autocast("cpu", torch.bfloat16)

    with LiveMemory() as memory:
        with _without_values(config):
            compiling = {} if config.train.compile == "off" else _counted_backend()
            stage = _stage(config, vae, torch.device("cpu"), **compiling)
            if not trainable(stage.model):
                raise ValueError("lora.targets has layers of the text encoder alone, whose training cannot be counted")
            trained = sum(p.numel() * 4 for p in trainable(stage.model).values())
            weights = memory.now
            ema = EMA(stage.model)
            copies = _further_averages(config) * trained
            averages = memory.now - weights + copies
            optimizer = build_optimizer(stage.model, config.optimizer)
            whole = isinstance(config, VAETrainingConfig) and config.train.whole_image_steps > 0
            for _ in range(2):  # the optimiser makes its state in the first step
                for _ in range(accumulated):
                    with autocast():  # left before the backward pass, as it keeps rounded weights
                        loss = (stage.whole_loss if whole else stage.loss)(micro)
                    loss.backward()
                    del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            gc.collect()  # what only reference cycles keep alive
            state = memory.now - weights - sum(p.numel() * 4 for p in ema.average.values())
            parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in stage.parts.items()}
            peak = memory.peak + copies
    flops = _flops_of_image(config, vae, whole)
    cached = 0
    if isinstance(config, UNetTrainingConfig) and config.train.cache_latents:
        views = 2 if config.data.flip > 0 else 1
        values = vae.latent_channels if config.is_pixel_space else 2 * vae.latent_channels * 4  # bytes at a place
        height, width = config.data.shape
        cached = images * views * values * (height // vae.downsampling) * (width // vae.downsampling)
        if config.text.pretrained is not None:
            cached += images * 77 * config.model.cross_attention_dim * 4
    adapters = isinstance(config, UNetTrainingConfig) and config.trains_adapters
    kept = trainable(stage.model) if adapters else stage.model.state_dict()  # without rounded weights
    saved = sum(t.numel() * t.element_size() for t in kept.values())
    checkpoint = saved + averages + state
    copied = checkpoint - int(config.publishes_best) * trained  # the best weights need no copy
    if config.ema.snapshot_every:
        copied += len(config.ema.snapshot_lengths) * trained
    return Counts(parameters, flops, weights, averages, state, peak, copied, checkpoint, cached)


def flops_by_step(config: Config, vae: VAEConfig) -> Callable[[int], int]:
    """FLOPs of an image in training, forward and backward, by the step; counted when it is first asked for.

    What gradient checkpointing computes again is not counted, and what `counts` leaves out is not either.
    config: a completed one.
    """
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    counted = cache(partial(_flops_of_image, config.model_copy(update={"train": train}), vae))

    def at(step: int) -> int:
        is_whole = isinstance(config, VAETrainingConfig) and step >= config.train.steps - config.train.whole_image_steps
        return counted(is_whole)

    return at


def _flops_of_image(config: Config, vae: VAEConfig, whole: bool) -> int:
    """Those of the layers as they are written, without what implementations of a device save or compute again."""
    with torch.device("meta"):
        stage = _stage(config, vae, torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            (stage.whole_loss if whole else stage.loss)(1).backward()
    return counter.get_total_flops()


def measure(
    config: Config, vae: VAEConfig, device: torch.device, images: CaptionedImages, seconds: float = 4.0
) -> Speed:
    """Time a completed config on this machine: steps, and what is done beside them, each for about so many seconds.

    images: some that stage 1 would be validated on. Where a micro-batch takes longer than that, a smaller one is timed
    and multiplied; where it takes much longer, the memory is not known. Nothing is compiled.
    """
    chart = _chart_seconds()
    stage = _stage(config, vae, device)
    optimizer, ema = build_optimizer(stage.model, config.optimizer), EMA(stage.model)
    batch, micro = config.train.batch_size, _micro_batch(config)
    copies = _further_averages(config) * sum(p.numel() * 4 for p in trainable(stage.model).values())

    def gradients_of(loss: Callable[[int], Tensor]) -> Callable[[int], None]:
        def gradients(n: int) -> None:
            if batch <= micro:
                optimizer.zero_grad(set_to_none=True)
            with _autocast(config, device):
                value = loss(n)
            value.backward()

        return gradients

    def update(_: int) -> None:
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), config.optimizer.max_grad_norm or torch.inf)
        optimizer.step()
        ema.update(stage.model, 0.99)

    @torch.no_grad()
    def forward(n: int) -> None:
        with _autocast(config, device):
            stage.forward(n)

    step, fits = _timed(gradients_of(stage.loss), micro, seconds, device)
    updated, _ = _timed(update, 1, seconds / 4, device)
    whole, whole_fits = step, True
    if isinstance(config, VAETrainingConfig) and config.train.whole_image_steps:
        whole, whole_fits = _timed(gradients_of(stage.whole_loss), micro, seconds, device)
    times: dict[str, float] = {}
    if isinstance(config, VAETrainingConfig):
        few = images.some(config.validation.batch_size)
        some = CaptionedImages(few.table, config.data, config.model.in_channels, few.seed, few.originals)

        def shown(n: int) -> CaptionedImages:
            return some.select([i % len(some) for i in range(n)])

        model = stage.model
        assert isinstance(model, AutoencoderKL)
        parts: dict[str, Callable[[int], object]] = {
            "validated": lambda n: validate_vae(model, shown(n), n),
            "reported": lambda n: autoencoder.measure(model, shown(n), n, progress=False),
        }
        for name, part in parts.items():
            times[name], _ = _timed(part, config.validation.batch_size, seconds / 2, device)
    else:
        times["forward"], _ = _timed(forward, config.validation.batch_size, seconds / 2, device)
    if isinstance(vae, AutoencoderKLConfig):
        times |= _autoencoder_seconds(config, vae, device, seconds / 2)
    peak = peak_memory(device) if fits and whole_fits else None
    return Speed(
        step * batch + updated,
        whole * batch + updated,
        chart=chart,
        peak_bytes=None if peak is None else peak + copies,
        **times,
    )


@torch.no_grad()
def _autoencoder_seconds(
    config: Config, vae: AutoencoderKLConfig, device: torch.device, seconds: float
) -> dict[str, float]:
    """Of encoding and decoding an image, without autocast, as it is done with a finished autoencoder."""
    model, most = AutoencoderKL(vae).to(device), config.validation.batch_size
    pixels = torch.zeros(most, vae.in_channels, *config.data.shape, device=device)
    latents = model.sample(model.encode(pixels[:1])).expand(most, -1, -1, -1)
    parts: dict[str, Callable[[int], object]] = {
        "encoded": lambda n: model.encode(pixels[:n]),
        "decoded": lambda n: model.decode(latents[:n]),
    }
    return {name: _timed(part, most, seconds, device)[0] for name, part in parts.items()}


def _chart_seconds() -> float:
    """Of one of a report's charts."""
    curve = {step: 1 / (1 + step) for step in range(100)}
    times = []
    for _ in range(2):  # the first one loads the fonts
        start = time.perf_counter()
        figure = loss_figure({"loss": curve, "validation/loss": curve})
        assert figure is not None
        rendered(figure)
        times.append(time.perf_counter() - start)
    return sum(times) / len(times)


def _further_averages(config: Config) -> int:
    """Copies of the trained weights besides the EMA: those of the best step, and for `latentdiff ema`."""
    return int(config.publishes_best) + (len(config.ema.snapshot_lengths) if config.ema.snapshot_every else 0)


def _timed(run: Callable[[int], object], most: int, seconds: float, device: torch.device) -> tuple[float, bool]:
    """Seconds for each of `most` items that are processed at once, or of fewer if these take too long.

    And whether they were that many, if only once.
    """

    def once(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        run(n)
        synchronize(device)
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
    each = (min(times) if len(times) < 3 else sorted(times)[len(times) // 2]) / n
    all_at_once = n == most or each * most < 5 * seconds
    if all_at_once and n < most:
        once(most)  # for the memory it takes
    return each, all_at_once


def seconds_of(config: Config, speed: Speed, images: CaptionedImages, held_out: CaptionedImages) -> Mapping[str, float]:
    """How long each part of a training takes, by what it is."""
    train = config.train
    validations = train.steps // config.validation.every + 1
    if isinstance(config, VAETrainingConfig):
        whole = config.train.whole_image_steps
        shown = len(held_out) or len(images)
        return {
            "steps": (train.steps - whole) * speed.step + whole * speed.whole_step,
            "validation": validations
            * (len(held_out) * speed.validated + config.validation.images * (speed.encoded + speed.decoded)),
            "the scale of the latents": len(images) * speed.encoded,
            "the report": shown * speed.reported + CHARTS * speed.chart,
        }
    validation = config.validation
    measured = min(len(held_out), validation.max_images or len(held_out))
    each = evaluations_per_image(measured, config.diffusion.num_train_timesteps, validation.bins) if measured else 0
    samples = validation.num_samples or len(validation.prompts)
    passes = validation.num_inference_steps * (1 if validation.guidance_scale == 1 else 2)
    views = 2 if config.data.flip > 0 else 1
    cached = len(images) * views if config.train.cache_latents else 0
    return {
        "steps": train.steps * speed.step,
        "validation": validations * 2 * measured * each * speed.forward,  # as many training images
        "samples": train.steps // validation.sample_every * samples * (passes * speed.forward + speed.decoded),
        "encoding the images": (cached + 2 * measured) * speed.encoded,
        "the report": CHARTS * speed.chart,
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
            lines.append(("time", f"about {duration(self.total_seconds)}: {spent}"))
        if train.compile != "off" and self.speed is not None:
            lines.append(("compile", f"the time is without train.compile {train.compile}"))
        if isinstance(config, UNetTrainingConfig):
            lines.append(("to expect", expectation(self.images)))
        notes = {"adversarial": "the adversarial loss", "perceptual": "the perceptual loss"}
        missing = [text for key, text in notes.items() if getattr(config.loss, key, None) is not None]
        if isinstance(config, UNetTrainingConfig) and config.text.pretrained is not None:
            missing.append("the frozen text encoder")
        if missing:
            lines.append(("not counted", " and ".join(missing)))
        return "\n".join(f"  {name:12}{text}" for name, text in lines)

    @property
    def total_seconds(self) -> float:
        """That the training will take; 0 if it was not measured."""
        return sum((self.seconds or {}).values())

    @property
    def epochs(self) -> float:
        """How often an image is trained on."""
        return self.config.train.steps * self.config.train.batch_size / max(1, self.images)

    @property
    def measured_bytes(self) -> int | None:
        """The most that the training will have in memory by what was measured: the process's, or that of the GPU."""
        if self.speed is None or self.speed.peak_bytes is None:
            return None
        return self.speed.peak_bytes + (self.counts.copies_bytes if self.device.type == "cpu" else 0)

    def _memory(self) -> str:
        found, on_cpu = self.counts, self.device.type == "cpu"
        text = (
            f"{_size(found.peak_bytes + on_cpu * found.copies_bytes)} of tensors: weights "
            f"{_size(found.weights_bytes)}, averages {_size(found.averages_bytes)}, optimiser "
            f"{_size(found.optimizer_bytes)}, activations and gradients {_size(found.step_bytes)}"
        )
        copies = f"the copy of a checkpoint that is being written {_size(found.copies_bytes)}"
        text += f", {copies}" if on_cpu else f"; in main memory {copies}"
        if self.measured_bytes is None:
            return text
        what = "in all, with the libraries and the images" if on_cpu else "on the GPU"
        return f"{_size(self.measured_bytes)} {what}; {text}"

    def _disk(self) -> str:
        kept = self.config.output.keep
        text = f"{kept} checkpoints of {_size(self.counts.checkpoint_bytes)}"
        return f"{text}, latent cache {_size(self.counts.cache_bytes)}" if self.counts.cache_bytes else text


def plan(path: Path, config: Config, device: torch.device, measured: bool, progress: bool) -> Plan:
    """What the training of a config will take. path: of its file. measured: time it on the device too."""
    vae = vae_config_of(config, path)
    config = completed(config, vae)
    images, held_out = open_run_images(config, vae, progress)
    speed = measure(config, vae, device, held_out if len(held_out) else images) if measured else None
    return planned(config, vae, device, images, held_out, speed)


def planned(
    config: Config,
    vae: VAEConfig,
    device: torch.device,
    images: CaptionedImages,
    held_out: CaptionedImages,
    speed: Speed | None,
) -> Plan:
    """What the training of a completed config will take."""
    seconds = None if speed is None else seconds_of(config, speed, images, held_out)
    return Plan(config, device, len(images), len(held_out), counts(config, vae, len(images), device), speed, seconds)


def expectation(images: int) -> str:
    """What a number of training images lets expect, from what was measured with the drawings of this project."""
    if images <= MEMORISED:
        return (
            f"{images:,} images: they are memorised. The weights from before are published, with vague samples "
            "(output.publish last: copies of them). New combinations need hundreds or thousands of images"
        )
    if images < COMPOSED:
        return (
            f"{images:,} images: most are memorised in time. The weights from before are published (output.publish "
            "last: samples near to training images). New combinations need thousands of images"
        )
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

"""`latentdiff evaluate-vae`: whether a trained autoencoder is fit for stage 2.

Reconstruction quality, statistics of the latents, and robustness of the latents to noise; then a verdict.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from latentdiff.config import load_run_config
from latentdiff.data.captioned_images import CaptionedImages, open_run_images
from latentdiff.devices import choose_device
from latentdiff.evaluation.metrics import psnr, ssim
from latentdiff.evaluation.reconstruction import LatentStatistics, reconstruct, reconstructions
from latentdiff.figures.grids import labelled_grid
from latentdiff.formats.diffusers_folder import PREVIEW_FILE, WEIGHTS_STEM, autoencoder_folder, read_files
from latentdiff.formats.files import read_json, read_safetensors, replacing, write_json, write_png
from latentdiff.formats.weight_files import find_weights
from latentdiff.images import to_bytes, to_images
from latentdiff.models.autoencoder import AutoencoderKL, open_autoencoder
from latentdiff.models.eval_mode import eval_mode
from latentdiff.models.initial_model import with_initial_model
from latentdiff.models.perceptual import ms_ssim, ms_ssim_scales
from latentdiff.pipeline.preview import fit_preview
from latentdiff.randomness import Stream, normal

REPORT_FILE = "vae_report.json"
IMAGE_FILE = "vae_report.png"
SIGMAS = (0.05, 0.1, 0.2, 0.4)  # of the noise on unit-scale latents
VERDICT_SIGMA = 0.1
NOISE_SEED = 0  # the same noise in every run, so that reports compare
DEAD_NATS = 0.01  # a channel with less information than this per latent value is dead
UNIT_TOLERANCE = 0.1  # of the mean and standard deviation of unit-scale latents
MIN_LPIPS_SIZE = 32  # pixels that AlexNet needs
EXTRA_METRICS = {"lpips": "torchvision", "fid": "torch-fidelity", "kid": "torch-fidelity"}  # and the packages they need
EXAMPLES = 3  # images each of the best, the median and the worst
DIFFERENCE_GAIN = 4
EXAMPLE_SIZE = 128  # pixels at least, to leave room for the labels; images are shrunk to at most twice that
PREVIEW_IMAGES = 32


# ----------------------------------------------------------------------------------------------------------------------
# The report


class Example(TypedDict):
    """An image with one of the best, median or worst reconstructions."""

    kind: str  # best, median or worst
    index: int
    psnr: float


@dataclass(frozen=True)
class VAEReport:
    """The measurements; every field is plain JSON. Means over images, latents at unit scale."""

    images: int
    size: int | list[int]  # pixels; height and width if they differ; with buckets of the square one
    buckets: int  # shapes that the images have
    latent_shape: list[int]  # C, h, w, of an image of this size
    # Reconstruction from the posterior mean, pixels clamped to [-1, 1].
    psnr: float  # dB
    ssim: float
    ms_ssim: float | None  # None if the images are too small for it
    ms_ssim_scales: int
    l1: float  # of a range of 2
    mse: float
    extra: dict[str, float]  # those of lpips, fid and kid that were asked for and could be measured
    not_measured: dict[str, str]  # the others, each with the reason
    # Latents sampled from the posteriors, by channel.
    channel_mean: list[float]
    channel_std: list[float]
    channel_kl: list[float]  # nats per latent value, from the unit Gaussian
    channel_information: list[float]  # nats per latent value, from the Gaussian with the channel's mean and std
    latent_mean: float  # over all channels
    latent_std: float
    kl: float  # nats per image
    # Decoded after adding Gaussian noise of these standard deviations to the posterior means.
    sigmas: list[float]
    noisy_psnr: list[float]  # dB, against the originals
    examples: list[Example]

    @property
    def dead_channels(self) -> list[int]:
        """Channels whose posterior is (nearly) the same for every image, at any mean and scale."""
        return [c for c, nats in enumerate(self.channel_information) if nats < DEAD_NATS]

    @property
    def scale_error(self) -> float:
        """How far the latents as a whole are from mean 0 or from standard deviation 1, whichever is further."""
        return max(abs(self.latent_mean), abs(self.latent_std - 1))

    @property
    def is_unit_scale(self) -> bool:
        return self.scale_error <= UNIT_TOLERANCE

    @property
    def noise_loss(self) -> float:
        """Loss of PSNR in dB by noise of sigma 0.1 on the latents."""
        return self.psnr - self.noisy_psnr[self.sigmas.index(VERDICT_SIGMA)]

    def table(self) -> str:
        """The figures as Markdown tables."""
        return "\n\n".join([_table(self._overall()), _table(self._by_channel())])

    def _overall(self) -> list[tuple[str, ...]]:
        ms_ssim = [] if self.ms_ssim is None else [(f"MS-SSIM, {self.ms_ssim_scales} scale(s)", f"{self.ms_ssim:.4f}")]
        extra = [(name.upper(), f"{value:.4f}") for name, value in self.extra.items()]
        missing = [(name.upper(), f"not measured: {reason}") for name, reason in self.not_measured.items()]
        noisy = [
            (f"PSNR (dB) with noise of {sigma:g} on the latents", f"{value:.2f}")
            for sigma, value in zip(self.sigmas, self.noisy_psnr, strict=True)
        ]
        return [
            ("measure", "value"),
            ("images", f"{self.images}, {self.size} px" + (f", {self.buckets} buckets" if self.buckets > 1 else "")),
            ("latents", " x ".join(map(str, self.latent_shape))),
            ("PSNR (dB)", f"{self.psnr:.2f}"),
            ("SSIM", f"{self.ssim:.4f}"),
            *ms_ssim,
            ("L1, of a range of 2", f"{self.l1:.4f}"),
            ("MSE, of a range of 2", f"{self.mse:.5f}"),
            *extra,
            *missing,
            ("KL (nats per image)", f"{self.kl:.1f}"),
            ("latent mean, standard deviation", f"{self.latent_mean:.3f}, {self.latent_std:.3f}"),
            (f"unit scale, within {UNIT_TOLERANCE:g}", "yes" if self.is_unit_scale else "no"),
            ("dead channels", f"{len(self.dead_channels)} of {len(self.channel_mean)}"),
            *noisy,
        ]

    def _by_channel(self) -> list[tuple[str, ...]]:
        numbers = zip(self.channel_mean, self.channel_std, self.channel_kl, self.channel_information, strict=True)
        rows = [
            (f"{c}{' (dead)' if c in self.dead_channels else ''}", *(f"{value:.3f}" for value in row))
            for c, row in enumerate(numbers)
        ]
        return [("channel", "mean", "standard deviation", "KL (nats per value)", "information (nats per value)"), *rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measure(
    vae: AutoencoderKL, images: CaptionedImages, batch_size: int, progress: bool, metrics: Sequence[str] = ()
) -> VAEReport:
    """Measure an autoencoder on images, with one batch of them in memory at a time.

    metrics: names in `EXTRA_METRICS`, whose networks are downloaded; the report says why one could not be measured.
    Raises ValueError if there is no image, the model does not take such images, or its outputs are not finite.
    """
    _check(vae, images)
    scales = ms_ssim_scales(images.layout.smallest_side)
    statistics = LatentStatistics(vae.config.latent_channels)
    extra, not_measured = _open_extra(metrics, images, vae.device)
    scores, order = [], []
    num_batches = sum(-(-len(group) // batch_size) for group in images.by_shape())
    with eval_mode(vae):
        batches = reconstructions(vae, images, batch_size)
        for batch in tqdm(batches, "measure", num_batches, unit="batch", disable=not progress, leave=False):
            if not (batch.moments.isfinite().all() and batch.reconstruction.isfinite().all()):
                raise ValueError(
                    f"the autoencoder's outputs are not finite for images {batch.indices[0]} .. {batch.indices[-1]}; "
                    "its training has diverged"
                )
            posterior = vae.unit_posterior(batch.moments.cpu().double())  # on the CPU: MPS has no float64
            statistics.add(posterior.mean, posterior.log_variance)
            pixels, reconstruction = batch.pixels, batch.reconstruction.clamp(-1, 1)
            noise = normal(batch.latents.shape[1:], NOISE_SEED, Stream.NOISE, 0, batch.indices).to(batch.latents)
            noisy = [psnr(pixels, vae.decode(batch.latents + sigma * noise).float()) for sigma in SIGMAS]
            rows = _scores(pixels, reconstruction, scales)
            scores.append(torch.stack([*rows, *noisy], dim=1).double().cpu())
            order += batch.indices
            _add_extra(extra, pixels, reconstruction)
    table = torch.cat(scores)[torch.tensor(order).argsort()]
    values = table.mean(dim=0).tolist()
    own, noisy_psnr = values[: -len(SIGMAS)], values[-len(SIGMAS) :]
    size = images.config.size
    return VAEReport(
        images=len(images),
        size=size if isinstance(size, int) else list(size),
        buckets=len(images.layout.shapes),
        latent_shape=[vae.config.latent_channels, *(side // vae.config.downsampling for side in images.config.shape)],
        psnr=own[0],
        ssim=own[1],
        l1=own[2],
        mse=own[3],
        ms_ssim=own[4] if scales else None,
        ms_ssim_scales=scales,
        extra=_compute_extra(extra),
        not_measured=not_measured,
        channel_mean=statistics.mean.tolist(),
        channel_std=statistics.variance.sqrt().tolist(),
        channel_kl=statistics.kl.tolist(),
        channel_information=statistics.information.tolist(),
        latent_mean=statistics.mean.mean().item(),
        latent_std=(statistics.square.mean() - statistics.mean.mean().square()).sqrt().item(),
        kl=statistics.kl.sum().item() * statistics.sums[3, 0].item() / len(images),
        sigmas=list(SIGMAS),
        noisy_psnr=noisy_psnr,
        examples=choose_examples(table[:, 0].tolist()),
    )


def _check(vae: AutoencoderKL, images: CaptionedImages) -> None:
    if len(images) == 0:
        raise ValueError("there are no images to measure the autoencoder on")
    config = vae.config
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the autoencoder takes {config.in_channels} channels and gives {config.out_channels}; reconstructions "
            "can be compared with images only if both numbers are the same"
        )


def _scores(pixels: Tensor, reconstruction: Tensor, scales: int) -> list[Tensor]:
    """PSNR, SSIM, L1, MSE and, unless `scales` is 0, MS-SSIM of each image: [B] each."""
    difference = (reconstruction - pixels).flatten(1)
    scores = [
        psnr(pixels, reconstruction),
        ssim(pixels, reconstruction),
        difference.abs().mean(dim=1),
        difference.square().mean(dim=1),
    ]
    return [*scores, ms_ssim(reconstruction, pixels, shifted=False)] if scales else scores


def choose_examples(scores: Sequence[float]) -> list[Example]:
    """The best, median and worst images by PSNR: three of each, fewer in a small set, no image twice."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    count = min(EXAMPLES, max(1, len(order) // 3))
    starts = {"best": 0, "median": (len(order) - count) // 2, "worst": len(order) - count}
    if len(order) < 3:
        del starts["median"]
    kinds = {rank: kind for kind, start in starts.items() for rank in range(start, start + count)}
    return [Example(kind=kinds[rank], index=order[rank], psnr=scores[order[rank]]) for rank in sorted(kinds)]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics by pretrained networks


def _open_extra(
    names: Sequence[str], images: CaptionedImages, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """torchmetrics' LPIPS, FID and KID of those names, and for each that cannot be measured the reason."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    size, subset = images.layout.smallest_side, min(len(images), 1000)
    open_metric = {
        "lpips": lambda: LearnedPerceptualImagePatchSimilarity("alex"),
        "fid": FrechetInceptionDistance,
        "kid": lambda: KernelInceptionDistance(subset_size=subset, subsets=1 if subset == len(images) else 100),
    }
    metrics, reasons = {}, {}
    for name in dict.fromkeys(names):
        if images.channels != 3:
            reasons[name] = f"it needs RGB images, these have {images.channels} channel(s)"
        elif name == "lpips" and size < MIN_LPIPS_SIZE:
            reasons[name] = f"it needs images of at least {MIN_LPIPS_SIZE} px, these have {size}"
        elif name != "lpips" and len(images) < 2:
            reasons[name] = "it needs at least two images"
        else:
            try:
                with torch.random.fork_rng():  # networks are initialised at random before their weights are loaded
                    metrics[name] = open_metric[name]().to(device)
            except ImportError:
                reasons[name] = f'it needs {EXTRA_METRICS[name]}: pip install "latentdiff[metrics]"'
            except OSError as error:
                reasons[name] = f"its network's weights could not be downloaded ({error})"
    return metrics, reasons


def _add_extra(metrics: dict[str, Any], pixels: Tensor, reconstruction: Tensor) -> None:
    """Add a batch: both [B, 3, H, W] in [-1, 1]."""
    for name, metric in metrics.items():
        if name == "lpips":
            metric.update(reconstruction, pixels)
        else:
            metric.update(to_bytes(pixels), real=True)
            metric.update(to_bytes(reconstruction), real=False)


def _compute_extra(metrics: dict[str, Any]) -> dict[str, float]:
    values = {}
    for name, metric in metrics.items():
        with torch.random.fork_rng():  # KID takes its subsets from the global random state
            torch.manual_seed(NOISE_SEED)
            value = metric.compute()
        values[name] = float(value[0] if name == "kid" else value)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Verdict


@dataclass(frozen=True)
class Thresholds:
    """What an autoencoder must reach to be fit for stage 2; the measurements behind the defaults are in docs/LOG.md."""

    min_psnr: float = 22.0  # dB
    min_ssim: float = 0.6
    max_dead_channels: float = 0.25  # fraction of them
    max_scale_error: float = 0.2  # of the mean and standard deviation of all latents
    max_noise_loss: float = 3.0  # dB of PSNR, by noise of sigma 0.1 on the latents

    def __post_init__(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            if not math.isfinite(value):
                raise ValueError(f"{key.name} is {value}, must be a finite number")
        if not 0 <= self.max_dead_channels <= 1:
            raise ValueError(f"max_dead_channels is {self.max_dead_channels:g}, a fraction: must be in 0 .. 1")


@dataclass(frozen=True)
class Check:
    """A measurement, its threshold, and whether it is passed."""

    name: str
    value: float
    threshold: float
    passed: bool
    reason: str  # one line: the value, what it must be and, if it fails, what that means


def verdict(report: VAEReport, thresholds: Thresholds) -> list[Check]:
    """The checks of an autoencoder: it is fit for stage 2 if all are passed."""
    dead, channels = len(report.dead_channels), len(report.channel_mean)
    return [
        _at_least("PSNR", report.psnr, thresholds.min_psnr, " dB", "generated images cannot be sharper than these"),
        _at_least("SSIM", report.ssim, thresholds.min_ssim, "", "reconstructions lose the structure of the images"),
        _at_most(
            "fraction of dead channels",
            dead / channels,
            thresholds.max_dead_channels,
            "",
            f"{dead} of {channels} latent channels carry (nearly) only noise; lower the weight of the KL",
        ),
        _at_most(
            "scale error",
            report.scale_error,
            thresholds.max_scale_error,
            "",
            f"latents have mean {report.latent_mean:.2f} and standard deviation {report.latent_std:.2f} instead of 0 "
            "and 1, which the noise schedule assumes",
        ),
        _at_most(
            "noise loss",
            report.noise_loss,
            thresholds.max_noise_loss,
            " dB",
            f"noise of {VERDICT_SIGMA:g} on the latents spoils the image, and so will small errors of stage 2; raise "
            "the weight of the KL",
        ),
    ]


def _at_least(name: str, value: float, threshold: float, unit: str, problem: str) -> Check:
    return _check_of(name, value, threshold, value >= threshold, "at least", unit, problem)


def _at_most(name: str, value: float, threshold: float, unit: str, problem: str) -> Check:
    return _check_of(name, value, threshold, value <= threshold, "at most", unit, problem)


def _check_of(name: str, value: float, threshold: float, passed: bool, bound: str, unit: str, problem: str) -> Check:
    found = f"{name} is {value:.3g}{unit}, must be {bound} {threshold:g}{unit}"
    return Check(name, value, threshold, passed, found if passed else f"{found}: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class Evaluation:
    """A report, what it was measured on, and the verdict."""

    data: str
    report: VAEReport
    thresholds: Thresholds
    checks: list[Check]
    files: list[Path] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        return all(check.passed for check in self.checks)

    def text(self) -> str:
        """Data, tables, checks and verdict as Markdown."""
        lines = [f"- {'passed' if check.passed else 'FAILED'}: {check.reason}" for check in self.checks]
        failed = sum(not check.passed for check in self.checks)
        result = "fit for stage 2" if self.fit else f"UNFIT for stage 2, {failed} of {len(self.checks)} checks failed"
        return "\n\n".join([f"Measured on {self.data}.", self.report.table(), "\n".join(lines), f"Verdict: {result}."])

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The contents of vae_report.json. folder: of the autoencoder."""
        return {
            "fit": self.fit,
            "data": self.data,
            "weights_sha256": weights_digest(folder),
            "checks": [asdict(check) for check in self.checks],
            "thresholds": asdict(self.thresholds),
            "report": asdict(self.report),
        }


def evaluate_run(
    run: Path,
    thresholds: Thresholds,
    *,
    config: Path | None = None,
    split: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    metrics: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Measure the autoencoder of `run`, a stage 1 run or what else `open_autoencoder` opens, and check the thresholds.

    Writes vae_report.json, vae_report.png and, for RGB images, latent_preview.json into the autoencoder's folder
    (RUN/vae in a pipeline); nothing for a single file or a hub id.
    config: of either stage, for its data section; None: RUN/config.yaml. split: "held-out" or "training"; None: the
    held-out images if there are any.
    Raises ValueError if there is no autoencoder, no config, no such split or no such device.
    """
    chosen = choose_device(device)
    vae = open_autoencoder(run).to(chosen)
    images, data = _images(run, config, split, vae, progress)
    report = measure(vae, images, batch_size, progress, metrics)
    result = Evaluation(data, report, thresholds, verdict(report, thresholds))
    if not run.is_dir():
        return result
    folder = autoencoder_folder(run)
    result.files.extend([folder / REPORT_FILE, folder / IMAGE_FILE])
    preview = None
    if vae.config.in_channels == 3:
        preview = fit_preview(
            vae, (pixels for _, pixels in images.some(PREVIEW_IMAGES).in_one_shape().batches(batch_size))
        )
        result.files.append(folder / PREVIEW_FILE)
    image = example_table(vae, images, report.examples)
    write_json(result.to_json(folder), folder / REPORT_FILE)
    write_png(image, folder / IMAGE_FILE)
    if preview is not None:
        preview.save(folder)
    return result


def _images(
    run: Path, config: Path | None, split: str | None, vae: AutoencoderKL, progress: bool
) -> tuple[CaptionedImages, str]:
    """The images to measure on, and a description of them."""
    path = config or run / "config.yaml"
    if not path.is_file():
        problem = f"{path} does not exist" if config else f"{run} has no config.yaml, which says what the images are"
        raise ValueError(f"{problem}; give --config the config of a training run")
    settings = load_run_config(path, with_initial_model)
    training, held_out = open_run_images(settings, vae.config, progress)
    if split == "held-out" and len(held_out) == 0:
        raise ValueError(f"{path} has no held-out images (data.holdout is 0); use --split training")
    use_training = split == "training" or len(held_out) == 0
    images = training if use_training else held_out
    kind = "training" if use_training else "held-out"
    why = " (none are held out)" if len(held_out) == 0 else ""
    source = settings.data.source
    return images, f"the {len(images)} {kind} images of {source!r}{why}, {images.layout}"


def weights_digest(folder: Path) -> str:
    """SHA-256 of the autoencoder's tensors: names, types, shapes, bytes.

    Not of the file: the order of the entries in its header changes each time the same weights are written.
    """
    digest = hashlib.sha256()
    weights = read_files(find_weights(folder, WEIGHTS_STEM).files, read_safetensors)
    for key, value in sorted(weights.items()):
        digest.update(f"\n{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def copy_report(vae: Path, folder: Path) -> None:
    """Copy the report on an autoencoder, with its image, into another folder; nothing if there is none of its weights.

    vae: as for `evaluate_run`.
    """
    if not vae.is_dir():
        return
    place = autoencoder_folder(vae)
    for name in (REPORT_FILE, IMAGE_FILE) if _own_report(place) is not None else ():
        if (place / name).is_file():
            with replacing(folder / name) as new:
                shutil.copyfile(place / name, new)


def _own_report(folder: Path) -> dict[str, Any] | None:
    """The report in an autoencoder's folder; None if there is none, or if it is of other weights."""
    if not (folder / REPORT_FILE).is_file():
        return None
    values = read_json(folder / REPORT_FILE)
    return values if values.get("weights_sha256") == weights_digest(folder) else None


def refuse_unfit(folder: Path, accept: bool) -> None:
    """Raise ValueError if the report of `latentdiff evaluate-vae` finds the autoencoder unfit for stage 2.

    folder: as for `evaluate_run`. Nothing is raised with `accept`, without a report, or if it is of other weights.
    """
    folder = autoencoder_folder(folder)
    path = folder / REPORT_FILE
    if accept or (values := _own_report(folder)) is None:
        return
    try:
        problems = [check["reason"] for check in values["checks"] if not check["passed"]]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a report of latentdiff evaluate-vae; delete it or write it again") from None
    if problems:
        raise ValueError(
            f"{path}: the autoencoder is unfit for stage 2: {'; '.join(problems)}. Train a better one, or use this one "
            "anyway with allow_unfit_vae=true"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Images


@torch.no_grad()
def example_table(vae: AutoencoderKL, images: CaptionedImages, examples: Sequence[Example]) -> Image.Image:
    """One row per example: original, reconstruction, and their difference times four around grey."""
    rows, labels = [], []
    with eval_mode(vae):
        for example in examples:
            pixels = images.pixels(example["index"])[None].to(vae.device)
            reconstruction = reconstruct(vae, pixels).float().clamp(-1, 1)
            difference = DIFFERENCE_GAIN * (reconstruction - pixels)
            if pixels.shape[1] in (2, 4):
                difference[:, -1] = 1.0  # opaque
            rows.append([_sized(image) for image in to_images(torch.cat([pixels, reconstruction, difference]))])
            labels.append(f"{example['kind']} {example['psnr']:.1f} dB, no. {example['index']}")
    return labelled_grid(rows, labels, ["original", "reconstruction", f"difference x {DIFFERENCE_GAIN}"])


def _sized(image: Image.Image) -> Image.Image:
    """Small images are enlarged by an integer factor without smoothing, large ones are shrunk."""
    if image.width > 2 * EXAMPLE_SIZE:
        return ImageOps.scale(image, 2 * EXAMPLE_SIZE / image.width)
    return ImageOps.scale(image, math.ceil(EXAMPLE_SIZE / image.width), Image.Resampling.NEAREST)

"""`latentdiff evaluate-vae`: does a trained autoencoder fit for stage 2?

How well it gives images back, what its latents look like to a diffusion model, how much noise they bear; a verdict.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.devices import choose_device
from latentdiff.evaluation.metrics import ms_ssim, ms_ssim_scales, psnr, ssim
from latentdiff.evaluation.reconstruction import reconstruct
from latentdiff.figures.grids import labelled_grid
from latentdiff.formats.diffusers_folder import WEIGHTS_STEM, autoencoder_folder, read_weights
from latentdiff.formats.files import read_json, write_json, write_png
from latentdiff.images import to_images
from latentdiff.models.autoencoder import AutoencoderKL, Posterior
from latentdiff.models.eval_mode import eval_mode
from latentdiff.pipeline.preview import PREVIEW_FILE, fit_preview
from latentdiff.randomness import Stream, normal

REPORT_FILE = "vae_report.json"
IMAGE_FILE = "vae_report.png"
LAGS = (1, 2, 4)  # latent pixels
SIGMAS = (0.05, 0.1, 0.2, 0.4)  # of the noise on unit-scale latents
VERDICT_SIGMA = 0.1
NOISE_SEED = 0  # the same noise in every run, so that reports compare
DEAD_NATS = 0.01  # a channel whose posterior tells less than this a latent value is dead
UNIT_TOLERANCE = 0.1  # of the mean and standard deviation of unit-scale latents
MAX_PSNR = 100.0  # dB; an image given back exactly would make the mean infinite
MIN_LPIPS_SIZE = 32  # pixels that AlexNet needs
EXTRA_METRICS = ("lpips", "fid", "kid")
EXAMPLES = 3  # images each of the best, the median and the worst
DIFFERENCE_GAIN = 4
EXAMPLE_SIZE = 128  # pixels at least, to leave room for the labels; images from twice that on are shrunk to twice it
PREVIEW_IMAGES = 32


# ----------------------------------------------------------------------------------------------------------------------
# The report


class Example(TypedDict):
    """An image whose reconstruction is one of the best, of the median ones or of the worst."""

    kind: str
    index: int
    psnr: float


@dataclass(frozen=True)
class VAEReport:
    """What was measured; every field is plain JSON. Means over images, latents at unit scale."""

    images: int
    size: int  # pixels
    latent_shape: list[int]  # C, h, w
    # Reconstruction from the posterior mean, pixels clamped to [-1, 1].
    psnr: float  # dB
    ssim: float
    ms_ssim: float | None  # None if the images are too small for it
    ms_ssim_scales: int
    l1: float  # of a range of 2
    mse: float
    extra: dict[str, float]  # of lpips, fid and kid those asked for
    not_measured: dict[str, str]  # and why
    # Latents: exact over posterior draws, by channel.
    channel_mean: list[float]
    channel_std: list[float]
    channel_kl: list[float]  # nats a latent value, from the unit Gaussian
    channel_information: list[float]  # nats a latent value, from the Gaussian with the channel's mean and deviation
    correlation: list[list[float]]  # between channels
    latent_mean: float  # over all channels
    latent_std: float
    kl: float  # nats an image
    lags: list[int]
    autocorrelation: list[float | None]  # mean over channels and both directions; None where latents are too small
    # Decoded after Gaussian noise of these deviations on the posterior means.
    sigmas: list[float]
    noisy_psnr: list[float]  # dB, against the originals
    examples: list[Example]

    @property
    def dead_channels(self) -> list[int]:
        """Those whose posterior says (nearly) nothing about the image, at whatever mean and scale."""
        return [c for c, nats in enumerate(self.channel_information) if nats < DEAD_NATS]

    @property
    def scale_error(self) -> float:
        """How far the latents as a whole are from mean 0 or from standard deviation 1, whichever is further."""
        return max(abs(self.latent_mean), abs(self.latent_std - 1))

    @property
    def unit_scale(self) -> bool:
        return self.scale_error <= UNIT_TOLERANCE

    @property
    def noise_loss(self) -> float:
        """dB of PSNR that noise of sigma 0.1 on the latents costs."""
        return self.psnr - self.noisy_psnr[self.sigmas.index(VERDICT_SIGMA)]

    def table(self) -> str:
        """The figures as Markdown tables."""
        return "\n\n".join([_table(self._overall()), _table(self._by_channel())])

    def _overall(self) -> list[tuple[str, ...]]:
        ms_ssim = [] if self.ms_ssim is None else [(f"MS-SSIM, {self.ms_ssim_scales} scales", f"{self.ms_ssim:.4f}")]
        extra = [(name.upper(), f"{value:.4f}") for name, value in self.extra.items()]
        missing = [(name.upper(), f"not measured: {reason}") for name, reason in self.not_measured.items()]
        lags = [
            (f"latent auto-correlation, lag {lag}", "latents too small" if value is None else f"{value:.3f}")
            for lag, value in zip(self.lags, self.autocorrelation, strict=True)
        ]
        noisy = [
            (f"PSNR (dB) with noise {sigma:g} on the latents", f"{value:.2f}")
            for sigma, value in zip(self.sigmas, self.noisy_psnr, strict=True)
        ]
        return [
            ("measure", "value"),
            ("images", f"{self.images}, {self.size} px"),
            ("latents", " x ".join(map(str, self.latent_shape))),
            ("PSNR (dB)", f"{self.psnr:.2f}"),
            ("SSIM", f"{self.ssim:.4f}"),
            *ms_ssim,
            ("L1, of a range of 2", f"{self.l1:.4f}"),
            ("MSE, of a range of 2", f"{self.mse:.5f}"),
            *extra,
            *missing,
            ("KL (nats an image)", f"{self.kl:.1f}"),
            ("latent mean, standard deviation", f"{self.latent_mean:.3f}, {self.latent_std:.3f}"),
            (f"unit scale, within {UNIT_TOLERANCE:g}", "yes" if self.unit_scale else "no"),
            ("dead channels", f"{len(self.dead_channels)} of {len(self.channel_mean)}"),
            ("largest correlation of two channels", f"{self._largest_correlation():.3f}"),
            *lags,
            *noisy,
        ]

    def _by_channel(self) -> list[tuple[str, ...]]:
        numbers = zip(self.channel_mean, self.channel_std, self.channel_kl, self.channel_information, strict=True)
        rows = [
            (f"{c}{' (dead)' if c in self.dead_channels else ''}", *(f"{value:.3f}" for value in row))
            for c, row in enumerate(numbers)
        ]
        return [("channel", "mean", "standard deviation", "KL (nats a value)", "information (nats a value)"), *rows]

    def _largest_correlation(self) -> float:
        off = [abs(r) for i, row in enumerate(self.correlation) for j, r in enumerate(row) if i != j]
        return max(off, default=0.0)


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

    metrics: further ones of `EXTRA_METRICS`, whose networks' weights must be there or be downloaded; what is missing is
    said in the report.
    Raises ValueError if there is no image, or the model does not take them or gives values that are not finite.
    """
    _check(vae, images)
    size = images.config.size
    scales = ms_ssim_scales(size)
    latents = LatentTally(vae.config.latent_channels)
    extra = _ExtraMetrics(metrics, len(images), images.channels, size, vae.device)
    scores = []
    batches = tqdm(
        images.batches(batch_size),
        "measure",
        -(-len(images) // batch_size),
        unit="batch",
        disable=not progress,
        leave=False,
    )
    with eval_mode(vae):
        for indices, pixels in batches:
            pixels = pixels.to(vae.device)
            moments = vae.encode(pixels)
            means = vae.sample(moments)
            decoded = vae.decode(means).float()
            if not (moments.isfinite().all() and decoded.isfinite().all()):
                raise ValueError(
                    f"the autoencoder gives values that are not finite for images {indices[0]} .. {indices[-1]}; its "
                    "training has diverged"
                )
            latents.add(*unit_posterior(vae, moments))
            reconstruction = decoded.clamp(-1, 1)
            noise = normal(means.shape[1:], NOISE_SEED, Stream.NOISE, 0, indices).to(means)
            noisy = [_psnr(pixels, vae.decode(means + sigma * noise).float()) for sigma in SIGMAS]
            rows = _scores(pixels, reconstruction, scales)
            scores.append(torch.stack([*rows, *noisy], dim=1).double().cpu())
            extra.update(pixels, reconstruction)
    table = torch.cat(scores)
    values = table.mean(dim=0).tolist()
    own, noisy_psnr = values[: -len(SIGMAS)], values[-len(SIGMAS) :]
    return VAEReport(
        images=len(images),
        size=size,
        latent_shape=list(means.shape[1:]),
        psnr=own[0],
        ssim=own[1],
        l1=own[2],
        mse=own[3],
        ms_ssim=own[4] if scales else None,
        ms_ssim_scales=scales,
        extra=extra.compute(),
        not_measured=extra.reasons,
        **latents.figures(),
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
            "can only be compared if they are as many"
        )


def _psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    return psnr(pixels, reconstruction).clamp(max=MAX_PSNR)


def _scores(pixels: Tensor, reconstruction: Tensor, scales: int) -> list[Tensor]:
    """PSNR, SSIM, L1, MSE and, if there is a scale for it, MS-SSIM of each image: [B] each."""
    difference = (reconstruction - pixels).flatten(1)
    scores = [
        _psnr(pixels, reconstruction),
        ssim(pixels, reconstruction),
        difference.abs().mean(dim=1),
        difference.square().mean(dim=1),
    ]
    return [*scores, ms_ssim(pixels, reconstruction, scales)] if scales else scores


def choose_examples(scores: Sequence[float]) -> list[Example]:
    """The best, the median and the worst images by PSNR: three each, fewer of a small set, none twice."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    count = min(EXAMPLES, max(1, len(order) // 3))
    starts = {"best": 0, "median": (len(order) - count) // 2, "worst": len(order) - count}
    if len(order) < 3:
        del starts["median"]
    kinds = {rank: kind for kind, start in starts.items() for rank in range(start, start + count)}
    return [Example(kind=kinds[rank], index=order[rank], psnr=scores[order[rank]]) for rank in sorted(kinds)]


# ----------------------------------------------------------------------------------------------------------------------
# Latents


def unit_posterior(vae: AutoencoderKL, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, h, w] float64 of the unit-scale latents that the posterior stands for."""
    log_variance = Posterior(moments).log_variance.cpu().double() + 2 * math.log(vae.config.scaling_factor)
    return vae.sample(moments).cpu().double(), log_variance


class LatentTally:
    """Sums over the posteriors of images, from which the statistics of their draws follow without a draw.

    A draw is z = mean + sqrt(v) * noise, so E[z] = E[mean], E[z z'] = E[mean mean'] but E[z^2] = E[mean^2 + v].
    """

    def __init__(self, channels: int) -> None:
        zeros = torch.zeros(channels, dtype=torch.float64)
        self.images = 0
        self.values = 0  # a channel
        self.sum = zeros.clone()
        self.products = torch.diag(zeros)  # of two channels at one place
        self.log_variance = zeros.clone()
        self.lagged = [zeros.clone() for _ in LAGS]  # products of one channel at two places
        self.ends = [zeros.clone() for _ in LAGS]  # sums over both places
        self.pairs = [0 for _ in LAGS]

    def add(self, mean: Tensor, log_variance: Tensor) -> None:
        """Take in posteriors [B, C, h, w] float64 of unit-scale latents."""
        self.images += mean.shape[0]
        self.values += mean[:, 0].numel()
        self.sum += mean.sum(dim=(0, 2, 3))
        flat = mean.movedim(1, 0).flatten(1)
        self.products += flat @ flat.T + torch.diag(log_variance.exp().sum(dim=(0, 2, 3)))
        self.log_variance += log_variance.sum(dim=(0, 2, 3))
        for i, lag in enumerate(LAGS):
            for dim in (2, 3):
                if lag < mean.shape[dim]:
                    near = mean.narrow(dim, 0, mean.shape[dim] - lag)
                    far = mean.narrow(dim, lag, mean.shape[dim] - lag)
                    self.lagged[i] += (near * far).sum(dim=(0, 2, 3))
                    self.ends[i] += (near + far).sum(dim=(0, 2, 3))
                    self.pairs[i] += near[:, 0].numel()

    def figures(self) -> dict[str, Any]:
        """The fields of `VAEReport` on latents.

        KL (nats a value, a channel) is that of the posterior from the unit Gaussian. The information is that from the
        Gaussian with the channel's own mean and variance s^2, (log s^2 - E[log v]) / 2: it bounds the mutual
        information with the image, is 0 if and only if all posteriors are the same, and knows no scale.
        """
        mean, square = self.sum / self.values, self.products.diag() / self.values
        covariance = self.products / self.values - mean[:, None] * mean
        variance = covariance.diag()
        std = variance.sqrt()
        log_variance = self.log_variance / self.values
        kl = (square - 1 - log_variance) / 2
        total_mean = mean.mean()
        return {
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
            "channel_kl": kl.tolist(),
            "channel_information": ((variance.log() - log_variance) / 2).tolist(),
            "correlation": (covariance / (std[:, None] * std)).tolist(),
            "latent_mean": total_mean.item(),
            "latent_std": (square.mean() - total_mean.square()).sqrt().item(),
            "kl": kl.sum().item() * self.values / self.images,
            "lags": list(LAGS),
            "autocorrelation": [self._autocorrelation(i, mean, variance) for i in range(len(LAGS))],
        }

    def _autocorrelation(self, i: int, mean: Tensor, variance: Tensor) -> float | None:
        if self.pairs[i] == 0:
            return None
        covariance = (self.lagged[i] - mean * self.ends[i]) / self.pairs[i] + mean.square()
        return (covariance / variance).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Metrics by pretrained networks


class _ExtraMetrics:
    """LPIPS, reconstruction FID and KID by torchmetrics, as far as their packages and weights can be had."""

    def __init__(self, names: Sequence[str], count: int, channels: int, size: int, device: torch.device) -> None:
        self.count = count
        self.metrics: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        for name in dict.fromkeys(names):
            assert name in EXTRA_METRICS
            reason = self._unsuitable(name, channels, size)
            if reason is None:
                try:
                    with torch.random.fork_rng():  # a new network draws weights before it loads its own
                        self.metrics[name] = self._open(name).to(device)
                except ImportError as error:
                    reason = str(error).splitlines()[0]
                except OSError as error:
                    reason = f"its network's weights could not be downloaded ({error})"
            if reason is not None:
                self.reasons[name] = reason

    def _unsuitable(self, name: str, channels: int, size: int) -> str | None:
        if channels != 3:
            return f"it needs RGB images, these have {channels} channel(s)"
        if name == "lpips" and size < MIN_LPIPS_SIZE:
            return f"it needs images of at least {MIN_LPIPS_SIZE} px, these have {size}"
        if name != "lpips" and self.count < 2:
            return "it needs at least two images"
        return None

    def _open(self, name: str) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        if name == "lpips":
            return LearnedPerceptualImagePatchSimilarity("alex")
        if name == "fid":
            return FrechetInceptionDistance()
        subset = min(self.count, 1000)
        return KernelInceptionDistance(subset_size=subset, subsets=1 if subset == self.count else 100)

    def update(self, pixels: Tensor, reconstruction: Tensor) -> None:
        """Both [B, 3, H, W] in [-1, 1]."""
        for name, metric in self.metrics.items():
            if name == "lpips":
                metric.update(reconstruction, pixels)
            else:
                metric.update(_to_bytes(pixels), real=True)
                metric.update(_to_bytes(reconstruction), real=False)

    def compute(self) -> dict[str, float]:
        values = {}
        for name, metric in self.metrics.items():
            with torch.random.fork_rng():  # KID draws its subsets from the global random state
                torch.manual_seed(NOISE_SEED)
                value = metric.compute()
            values[name] = float(value[0] if name == "kid" else value)
        return values


def _to_bytes(pixels: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8, rounded as in a saved image."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Verdict


@dataclass(frozen=True)
class Thresholds:
    """What an autoencoder must reach to be worth a stage 2; the measurements behind the defaults are in docs/LOG.md."""

    min_psnr: float = 22.0  # dB
    min_ssim: float = 0.6
    max_dead_channels: float = 0.25  # share
    max_scale_error: float = 0.2  # of the mean and standard deviation of all latents
    max_noise_loss: float = 3.0  # dB of PSNR, by noise of sigma 0.1 on the latents

    def __post_init__(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            if not math.isfinite(value):
                raise ValueError(f"{key.name} is {value}, must be a finite number")
        if not 0 <= self.max_dead_channels <= 1:
            raise ValueError(f"max_dead_channels is {self.max_dead_channels:g}, a share: must be in 0 .. 1")


@dataclass(frozen=True)
class Check:
    """One measure beside its threshold, and what to make of it."""

    name: str
    value: float
    threshold: float
    passed: bool
    reason: str


def verdict(report: VAEReport, thresholds: Thresholds) -> list[Check]:
    """Whether an autoencoder fits for stage 2: it does if all checks are passed."""
    dead, channels = len(report.dead_channels), len(report.channel_mean)
    return [
        _at_least("PSNR", report.psnr, thresholds.min_psnr, " dB", "generated images cannot be sharper than these"),
        _at_least("SSIM", report.ssim, thresholds.min_ssim, "", "reconstructions lose the structure of the images"),
        _at_most(
            "share of dead channels",
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
    return _judged(name, value, threshold, value >= threshold, f"{threshold:g}{unit} or more", unit, problem)


def _at_most(name: str, value: float, threshold: float, unit: str, problem: str) -> Check:
    return _judged(name, value, threshold, value <= threshold, f"{threshold:g}{unit} or less", unit, problem)


def _judged(name: str, value: float, threshold: float, passed: bool, wanted: str, unit: str, problem: str) -> Check:
    found = f"{name} is {value:.3g}{unit}, wanted is {wanted}"
    return Check(name, value, threshold, passed, found if passed else f"{found}: {problem}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class Evaluation:
    """A report, what it was measured on, and the verdict on it."""

    folder: Path  # of the autoencoder
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

    def to_json(self) -> dict[str, Any]:
        """As vae_report.json holds it."""
        return {
            "fit": self.fit,
            "data": self.data,
            "weights_sha256": weights_digest(self.folder),
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
    """Measure and judge the autoencoder in `run`: the folder of a stage 1 run, or of a pipeline.

    Writes vae_report.json, vae_report.png and, of RGB images, latent_preview.json into the autoencoder's folder
    (RUN/vae of a pipeline).
    config: of either stage, for its data section; None: RUN/config.yaml. split: "held-out" or "training"; None: the
    held-out images if there are any.
    Raises ValueError if there is no autoencoder, no config, no such split or no such device.
    """
    folder = autoencoder_folder(run)
    chosen = choose_device(device)
    vae = AutoencoderKL.from_pretrained(folder).to(chosen)
    images, data = _images(run, config, split, vae.config.in_channels, progress)
    report = measure(vae, images, batch_size, progress, metrics)
    files = [folder / REPORT_FILE, folder / IMAGE_FILE]
    preview = None
    if vae.config.in_channels == 3:
        preview = fit_preview(vae, (pixels for _, pixels in images.some(PREVIEW_IMAGES).batches(batch_size)))
        files.append(folder / PREVIEW_FILE)
    result = Evaluation(folder, data, report, thresholds, verdict(report, thresholds), files)
    image = example_table(vae, images, report.examples)
    write_json(result.to_json(), folder / REPORT_FILE)
    write_png(image, folder / IMAGE_FILE)
    if preview is not None:
        preview.save(folder)
    return result


def _images(
    run: Path, config: Path | None, split: str | None, channels: int, progress: bool
) -> tuple[CaptionedImages, str]:
    """The images to measure on, and what they are in words."""
    path = config or run / "config.yaml"
    if not path.is_file():
        problem = f"{path} does not exist" if config else f"{run} has no config.yaml, which says what the images are"
        raise ValueError(f"{problem}; give --config the config of a training run")
    second = re.search("^vae:", path.read_text(encoding="utf-8"), re.MULTILINE)
    settings = load_config(UNetTrainingConfig if second else VAETrainingConfig, path)
    training, held_out = open_images(settings.data, channels, settings.train.seed, progress)
    if split == "held-out" and len(held_out) == 0:
        raise ValueError(f"{path} holds no images out (data.holdout is 0); use --split training")
    use_training = split == "training" or len(held_out) == 0
    images = training if use_training else held_out
    kind = "training" if use_training else "held-out"
    why = " (none are held out)" if len(held_out) == 0 else ""
    source = settings.data.source
    return images, f"the {len(images)} {kind} images of {source!r}{why}, {settings.data.size} px"


def weights_digest(folder: Path) -> str:
    """SHA-256 of the autoencoder's tensors: names, types, shapes, bytes.

    Not of the file, whose header has its entries in another order each time the same weights are written.
    """
    digest = hashlib.sha256()
    for key, value in sorted(read_weights(folder, WEIGHTS_STEM).items()):
        digest.update(f"\n{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_unfit(folder: Path, accept: bool) -> None:
    """Raise ValueError if `latentdiff evaluate-vae` has found the autoencoder in `folder` unfit for stage 2.

    folder: as for `evaluate_run`. Without a report, or with one of other weights, nothing is said; nor with `accept`.
    """
    folder = autoencoder_folder(folder)
    path = folder / REPORT_FILE
    if accept or not path.is_file():
        return
    values = read_json(path)
    if values.get("weights_sha256") != weights_digest(folder):
        return
    try:
        problems = [check["reason"] for check in values["checks"] if not check["passed"]]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a report of latentdiff evaluate-vae; delete it or write it anew") from None
    if problems:
        raise ValueError(
            f"{path}: the autoencoder is unfit for stage 2: {'; '.join(problems)}. Train a better one, or go on anyway "
            "with allow_unfit_vae=true"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Images


@torch.no_grad()
def example_table(vae: AutoencoderKL, images: CaptionedImages, examples: Sequence[Example]) -> Image.Image:
    """A row an example: original, reconstruction, and their difference times four around grey."""
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
    """Small images enlarged by a whole factor without smoothing, large ones shrunk."""
    if image.width > 2 * EXAMPLE_SIZE:
        return ImageOps.scale(image, 2 * EXAMPLE_SIZE / image.width)
    return ImageOps.scale(image, math.ceil(EXAMPLE_SIZE / image.width), Image.Resampling.NEAREST)

"""How good class-conditional images are, measured with a small classifier trained on the real ones: no download.

The classes are the captions. Two measures: the share of drawn images that the classifier takes for the prompted
class, and the kernel Inception distance between drawn and real images on the classifier's features. Its figures are
not those of an Inception network, and compare only pipelines that the same classifier has measured.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.config import OptimizerConfig
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.formats.files import load_strictly, read_safetensors, write_safetensors
from latentdiff.images import from_bytes, to_bytes, to_pixels
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.optimizer import learning_rate_at

MAX_CLASSES = 1000  # more different captions are descriptions, not classes
MIN_SIZE = 16  # pixels
WIDTHS = (32, 64, 128)  # channels of the stages, each of half the resolution
POOLED = 4  # side of the last feature map, whatever the image's size
FEATURES = 128
GROUPS = 8
PEAK_LR = 4e-3
WEIGHT_DECAY = 0.01
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # images, at most
FEATURE_BATCH = 500  # images classified at once; no figure depends on it


# ----------------------------------------------------------------------------------------------------------------------
# Classes


def classes_of(images: CaptionedImages) -> tuple[str, ...]:
    """The distinct captions, sorted; ValueError unless there are 2 .. 1000 and none is empty."""
    source = images.config.source
    if images.config.caption_column is None:
        raise ValueError(f"data.caption_column is null, but the classes of {source!r} are its captions")
    classes = tuple(sorted(set(images.captions)))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(
            f"{source!r} has {len(classes)} different caption(s), must have 2 .. {MAX_CLASSES} to be taken as classes"
        )
    if 2 * len(classes) > len(images):
        raise ValueError(
            f"{source!r} has {len(classes)} different captions for {len(images)} images: they are descriptions, "
            "not classes"
        )
    if not classes[0].strip():
        raise ValueError(f"{source!r} has an unconditional prompt, which cannot be a class")
    return classes


def of_classes(images: CaptionedImages, classes: Sequence[str]) -> CaptionedImages:
    """The held-out images whose captions are among `classes`; ValueError if there are fewer than two."""
    wanted = set(classes)
    rows = [row for row, caption in enumerate(images.captions) if caption in wanted]
    if len(rows) < 2:
        advice = "" if len(images) else "; set data.validation_split or data.holdout"
        raise ValueError(
            f"{len(rows)} of {len(images)} held-out images are of the {len(classes)} classes, must be at least 2"
            + advice
        )
    return CaptionedImages(images.table.select(rows), images.config, images.channels, images.seed)


def _read(images: CaptionedImages, classes: Sequence[str], progress: bool) -> tuple[Tensor, Tensor]:
    """All images, undistorted, as uint8 [N, C, H, W], and the numbers of their classes [N]."""
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[caption] for caption in images.captions])
    rows = tqdm(range(len(images)), "read images", disable=not progress, leave=False)
    return torch.stack([to_bytes(images.pixels(row)) for row in rows]), labels


# ----------------------------------------------------------------------------------------------------------------------
# Classifier


class Classifier(nn.Module):
    """Three strided convolutions, a hidden layer and a linear head: pixels [B, C, H, W] in [-1, 1] -> logits [B, K].

    Takes images of any size from 16 pixels; `size` is that of its training images, which it has to measure at.
    No layer depends on the batch or on the mode (training or evaluation).
    """

    def __init__(self, classes: Sequence[str], channels: int, size: int) -> None:
        """ValueError if the size is below 16 pixels."""
        super().__init__()
        if size < MIN_SIZE:
            raise ValueError(f"the classifier needs images of at least {MIN_SIZE} pixels, these have {size}")
        self.classes = tuple(classes)
        self.channels = channels
        self.size = size
        stages = zip((channels, *WIDTHS), WIDTHS, strict=False)
        self.stages = nn.Sequential(*[_stage(before, after) for before, after in stages])
        self.hidden = nn.Linear(WIDTHS[-1] * POOLED**2, FEATURES)
        self.head = nn.Linear(FEATURES, len(self.classes))

    @classmethod
    def from_seed(cls, classes: Sequence[str], channels: int, size: int, generator: torch.Generator) -> Self:
        """Random weights drawn from `generator` alone (He et al. 2015); the global random state is left alone."""
        with torch.device("meta"):
            model = cls(classes, channels, size)
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.GroupNorm | nn.Linear):
                nn.init.zeros_(module.bias)
        return model

    def features(self, pixels: Tensor) -> Tensor:
        """What the head sees, not negative: [B, 128]."""
        return F.relu(self.hidden(F.adaptive_avg_pool2d(self.stages(pixels), POOLED).flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; its header has the classes, channels and size."""
        about = {"classes": self.classes, "channels": self.channels, "size": self.size}
        write_safetensors(self.state_dict(), path, {"classifier": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; ValueError if the file is missing, broken, something else or does not fit exactly."""
        weights = read_safetensors(path)
        about = _about(path)
        with torch.device("meta"):
            model = cls(about["classes"], about["channels"], about["size"])
        load_strictly(model, weights, str(path))
        return model

    def check(self, images: CaptionedImages, place: str) -> None:
        """Raise ValueError, starting with `place`, if it was trained on other classes, channels or sizes."""
        classes, size = classes_of(images), images.config.size
        if self.classes != classes:
            differing = sorted(set(self.classes) ^ set(classes))
            raise ValueError(
                f"{place} knows {len(self.classes)} classes, the images have {len(classes)}; only in one of the two: "
                f"{_first(differing)}"
            )
        if (self.channels, self.size) != (images.channels, size):
            raise ValueError(
                f"{place} takes {self.channels} channel(s) of {self.size} px, the images have {images.channels} of "
                f"{size} px"
            )


def _stage(before: int, after: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, after), nn.ReLU())


def _about(path: Path) -> dict[str, Any]:
    """The classes, channels and size in a classifier's header."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["classifier"])
        known = {"classes": [str(name) for name in about["classes"]]}
        return known | {key: int(about[key]) for key in ("channels", "size")}
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a classifier: its header has no classes, channels and size") from None


def _first(names: Sequence[str], at_most: int = 3) -> str:
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")


def train_classifier(
    images: CaptionedImages,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 128,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Learn the images' captions as classes: AdamW with a cosine, cross-entropy, `steps` batches, undistorted.

    A function of the images and the seed, bit for bit on a CPU; the global random state is neither used nor changed.
    All images are held in memory as bytes. Raises ValueError as `classes_of`, or if they are below 16 pixels.
    """
    classes = classes_of(images)
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier.from_seed(classes, images.channels, images.config.size, generator).to(device)
    values, labels = _read(images, classes, progress)
    schedule = OptimizerConfig(lr=PEAK_LR, lr_schedule="cosine", warmup_steps=min(100, steps // 10))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    epochs = -(-steps * batch_size // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    for step in tqdm(range(steps), "train classifier", unit="step", disable=not progress, leave=False):
        rows = order[step * batch_size : (step + 1) * batch_size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, schedule)
        loss = F.cross_entropy(classifier(from_bytes(values[rows].to(classifier.device))), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


@torch.no_grad()
def classify(classifier: Classifier, values: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] -> features [N, 128] float64 and the most likely classes [N], both on the CPU."""
    features, classes = [], []
    for part in values.split(FEATURE_BATCH):
        features.append(classifier.features(from_bytes(part.to(classifier.device))))
        classes.append(classifier.head(features[-1]).argmax(dim=1))
    return torch.cat(features).cpu().double(), torch.cat(classes).cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Measures


@dataclass(frozen=True)
class KID:
    """Mean and standard deviation of the squared MMD over subsets; the mean may be slightly negative."""

    mean: float
    std: float


def kernel_inception_distance(features: Tensor, reference: Tensor, seed: int = 0) -> KID:
    """Unbiased squared MMD between features [N, D] and [M, D] with the kernel (x.y / c + 1)^3 (Binkowski et al. 2018).

    c is the mean of y.y over the reference: the paper has D, which suits Inception's features, but those of a small
    classifier have another scale after each training. Over 100 subsets of half the smaller set, at most 1000 and at
    least 2 images, drawn from `seed`; the global random state is as before.
    """
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, max(2, min(len(features), len(reference)) // 2))
    gamma = 1 / reference.square().sum(dim=1).mean().item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")  # they are saved already
        metric = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=size, gamma=gamma)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(devices=[]):  # the subsets come from the global random state
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return KID(mean.item(), std.item())


@dataclass(frozen=True)
class ClassFidelity:
    """What a classifier makes of drawn images, beside what it makes of real ones.

    Guided images may be more typical of their class than real ones, and so be recognised more often.
    """

    classes: tuple[str, ...]
    per_class: int  # drawn images
    held_out: int  # real images they are compared with
    accuracy: float  # share of drawn images taken for the prompted class
    accuracy_real: float  # the same of held-out images
    class_accuracy: dict[str, float]
    class_accuracy_real: dict[str, float]  # without the classes that have no held-out image
    kid: KID  # drawn to held-out images
    kid_floor: KID  # as many training images to held-out images, with what the classifier knows by heart
    images: list[Image.Image] = field(repr=False, compare=False)  # drawn, `per_class` of each class in turn


def class_fidelity(
    pipeline: LatentDiffusionPipeline,
    classifier: Classifier,
    training: CaptionedImages,
    held_out: CaptionedImages,
    per_class: int = 100,
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = True,
    **options: Any,
) -> ClassFidelity:
    """Draw `per_class` images of each class, image i with seed + i, and compare them with the held-out ones.

    The held-out images enter in their own proportions, the drawn ones in equal ones: so KID is of use where classes
    are about equally common. options: of the pipeline's call; what they do not say are the pipeline's own defaults.
    Raises ValueError if `per_class` is below 1, fewer than two held-out images are of the classes, the classifier is
    of other data, or the pipeline draws other channels than the images have.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}, must be at least 1")
    classifier.check(training, "the classifier")
    channels = pipeline.vae.config.in_channels
    if channels != training.channels:
        raise ValueError(f"the pipeline draws {channels} channel(s), but the images have {training.channels}")
    classes = classifier.classes
    held_out = of_classes(held_out, classes)
    real, real_labels = _read(held_out, classes, progress)
    reference, real_guesses = classify(classifier, real)
    images = _draw(pipeline, classes, per_class, training.config.size, seed, batch_size, progress, options)
    drawn, guesses = classify(classifier, torch.stack([to_bytes(to_pixels(image)) for image in images]))
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    floor, _ = classify(classifier, _read(training.some(len(images)), classes, progress)[0])
    return ClassFidelity(
        classes=classes,
        per_class=per_class,
        held_out=len(held_out),
        accuracy=_share(guesses == labels),
        accuracy_real=_share(real_guesses == real_labels),
        class_accuracy=_by_class(guesses == labels, labels, classes),
        class_accuracy_real=_by_class(real_guesses == real_labels, real_labels, classes),
        kid=kernel_inception_distance(drawn, reference),
        kid_floor=kernel_inception_distance(floor, reference),
        images=images,
    )


def _draw(
    pipeline: LatentDiffusionPipeline,
    classes: Sequence[str],
    per_class: int,
    size: int,
    seed: int,
    batch_size: int,
    progress: bool,
    options: dict[str, Any],
) -> list[Image.Image]:
    prompts = [name for name in classes for _ in range(per_class)]
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(prompts), batch_size), "draw", unit="batch", disable=not progress, leave=False):
        batch = prompts[first : first + batch_size]
        images += pipeline(batch, height=size, width=size, seed=seed + first, progress=False, **options).images
    return images


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _by_class(hits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    return {name: _share(hits[labels == i]) for i, name in enumerate(classes) if (labels == i).any()}

"""Quality of class-conditional images, measured with a small classifier that is trained on the real ones.

The classes are the captions. Two measures: the fraction of generated images that the classifier recognises as the
prompted class, and the kernel Inception distance (KID) between generated and real images on the classifier's features.
These are not the features of an Inception network: the figures only compare pipelines measured by the same classifier.
"""

import json
import math
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

from latentdiff.config import in_yaml, shape_of, size_of
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.evaluation.prompts import generate
from latentdiff.formats.files import load_strictly, read_safetensors, write_safetensors
from latentdiff.images import from_bytes, to_bytes, to_pixels
from latentdiff.pipeline import LatentDiffusionPipeline

MAX_CLASSES = 1000  # more different captions are descriptions, not classes
MIN_SIZE = 16  # pixels
WIDTHS = (32, 64, 128)  # channels of the stages, each at half the resolution of the one before
POOLED = 4  # side of the last feature map, for images of any size
FEATURES = 128
GROUPS = 8
PEAK_LR = 4e-3
MAX_WARMUP = 100  # steps
WEIGHT_DECAY = 0.01
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # images, at most
FEATURE_BATCH = 500  # images classified at once; the results do not depend on it


# ----------------------------------------------------------------------------------------------------------------------
# Classes


def classes_of(images: CaptionedImages) -> tuple[str, ...]:
    """The distinct captions, sorted; ValueError unless there are 2 .. 1000, fewer than images, and none is empty."""
    source = f"{images.config.source!r}"
    if not images.captioned:
        raise ValueError(f"{source} has no captions, but its classes are its captions")
    classes = tuple(sorted(set(images.captions)))
    found = f"{source} has {len(classes)} different caption(s)"
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"{found}, must have 2 .. {MAX_CLASSES} to use them as classes")
    if 2 * len(classes) > len(images):
        raise ValueError(f"{found} for {len(images)} images: they are descriptions, not classes")
    if not classes[0].strip():
        raise ValueError(f"{source} has an empty caption, which cannot be a class")
    return classes


def of_classes(images: CaptionedImages, classes: Sequence[str]) -> CaptionedImages:
    """The held-out images whose captions are among `classes`; ValueError if there are fewer than two."""
    wanted = set(classes)
    rows = [row for row, caption in enumerate(images.captions) if caption in wanted]
    if len(rows) < 2:
        found = f"{len(rows)} of {len(images)} held-out images are of the {len(classes)} classes, must be at least 2"
        raise ValueError(found if len(images) else f"{found}; set data.validation_split or data.holdout")
    return images.select(rows)


def _read(images: CaptionedImages, classes: Sequence[str], progress: bool) -> tuple[Tensor, Tensor]:
    """All images as uint8 [N, C, H, W], and the indices of their classes [N].

    Cropped and flipped as in training, but in one shape: that is what the model learns to generate.
    """
    images = images.in_one_shape()
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[caption] for caption in images.captions])
    rows = tqdm(range(len(images)), "read images", disable=not progress, leave=False)
    return torch.stack([to_bytes(images.pixels(row, images.view(row, 0))) for row in rows]), labels


# ----------------------------------------------------------------------------------------------------------------------
# Classifier


class Classifier(nn.Module):
    """Three strided convolutions, a hidden layer and a linear head: pixels [B, C, H, W] in [-1, 1] -> logits [B, K].

    It works on images of any size from 16 pixels, but measures only those of its training images' `size`.
    No layer depends on the batch or on the mode (training or evaluation).
    """

    def __init__(self, classes: Sequence[str], channels: int, size: int | tuple[int, int]) -> None:
        """size: one number, or (height, width). ValueError if a side is below 16 pixels."""
        super().__init__()
        if min(shape_of(size)) < MIN_SIZE:
            raise ValueError(f"the classifier needs images of at least {MIN_SIZE} pixels, these have {in_yaml(size)}")
        self.classes = tuple(classes)
        self.channels = channels
        self.size = size
        stages = zip((channels, *WIDTHS), WIDTHS, strict=False)
        self.stages = nn.Sequential(*[_stage(before, after) for before, after in stages])
        self.hidden = nn.Linear(WIDTHS[-1] * POOLED**2, FEATURES)
        self.head = nn.Linear(FEATURES, len(self.classes))

    @classmethod
    def from_seed(
        cls, classes: Sequence[str], channels: int, size: int | tuple[int, int], generator: torch.Generator
    ) -> Self:
        """Random weights that depend on `generator` alone (He et al. 2015), not on the global random state."""
        with torch.device("meta"):
            model = cls(classes, channels, size)
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()  # ones and zeros
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model

    def features(self, pixels: Tensor) -> Tensor:
        """The input of the head, not negative: [B, 128]."""
        return F.relu(self.hidden(F.adaptive_avg_pool2d(self.stages(pixels), POOLED).flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; its header has the classes, channels and size."""
        header = {"classes": self.classes, "channels": self.channels, "size": self.size}
        write_safetensors(self.state_dict(), path, {"classifier": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; ValueError if the file is missing, broken, something else or does not fit exactly."""
        weights = read_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["classifier"])
            classes, channels = map(str, header["classes"]), int(header["channels"])
            sides = header["size"] if isinstance(header["size"], list) else [header["size"]] * 2
            height, width = map(int, sides)
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is not a classifier: its header has no classes, channels and size") from None
        with torch.device("meta"):
            model = cls(tuple(classes), channels, size_of((height, width)))
        load_strictly(model, weights, str(path))
        return model

    def check(self, images: CaptionedImages, place: str) -> None:
        """Raise ValueError, starting with `place`, if it was trained on other classes, channels or sizes."""
        classes, size = classes_of(images), images.config.size
        if self.classes != classes:
            differing = sorted(set(self.classes) ^ set(classes))
            raise ValueError(
                f"{place} knows {len(self.classes)} classes, the images have {len(classes)}; only in one of the two: "
                + ", ".join(differing[:3] + ["..."] * (len(differing) > 3))
            )
        if (self.channels, self.size) != (images.channels, size):
            own = f"{place} takes {self.channels} channel(s) of {in_yaml(self.size)} px"
            raise ValueError(f"{own}, the images have {images.channels} of {in_yaml(size)} px")


def _stage(before: int, after: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, after), nn.ReLU())


def train_classifier(
    images: CaptionedImages,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 128,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train on the images, undistorted, with their captions as classes: `steps` steps of AdamW on the cross-entropy.

    The result is a function of the images and the arguments, bit for bit on a CPU; the global random state is neither
    used nor changed. All images are held in memory as bytes.
    Raises ValueError as `classes_of` does, and for images below 16 pixels.
    """
    classes = classes_of(images)
    generator = torch.Generator().manual_seed(seed)
    classifier = Classifier.from_seed(classes, images.channels, images.config.size, generator).to(device)
    values, labels = _read(images, classes, progress)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    epochs = -(-steps * batch_size // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    for step in tqdm(range(steps), "train classifier", unit="step", disable=not progress, leave=False):
        rows = order[step * batch_size : (step + 1) * batch_size]
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate_at(step, steps)
        loss = F.cross_entropy(classifier(from_bytes(values[rows].to(classifier.device))), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


def _learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, at most 100, then half a cosine down to 0."""
    warmup = min(MAX_WARMUP, steps // 10)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.5 * PEAK_LR * (1 + math.cos(math.pi * progress))


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

    c is the mean of y.y over the reference. The paper's c = D suits Inception's features, but the features of a small
    classifier have a different scale after each training. Over 100 random subsets of half the smaller set, at most 1000
    and at least 2 images, which depend on `seed` alone; the global random state is neither used nor changed.
    """
    # Not at the top: torchmetrics imports matplotlib's pyplot, which writes a font cache.
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, max(2, min(len(features), len(reference)) // 2))
    gamma = 1 / reference.square().sum(dim=1).mean().item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")  # they fit into memory
        metric = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=size, gamma=gamma)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(devices=[]):  # it takes the subsets from the global random state
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return KID(mean.item(), std.item())


@dataclass(frozen=True)
class ClassFidelity:
    """How well a classifier recognises generated images, beside how well it recognises real ones.

    Guided images may be more typical of their class than real ones, and so be recognised more often.
    """

    classes: tuple[str, ...]
    per_class: int  # generated images
    held_out: int  # real images they are compared with
    accuracy: float  # fraction of the generated images recognised as the prompted class
    accuracy_real: float  # the same for held-out images
    class_accuracy: dict[str, float]
    class_accuracy_real: dict[str, float]  # without the classes that have no held-out image
    kid: KID  # generated to held-out images
    kid_floor: KID  # the same for as many training images, which the classifier has been trained on
    images: list[Image.Image] = field(repr=False, compare=False)  # generated, `per_class` of each class in turn


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
    """Generate `per_class` images of each class, image i with seed + i, and compare them with the held-out ones.

    All classes have equally many generated images, but not held-out images: so KID is meaningful where they are about
    equally common. options: arguments of the pipeline's call, instead of its defaults.
    Raises ValueError if `per_class` is below 1, fewer than two held-out images are of the classes, the classifier is
    for other data, or the pipeline generates other channels than the images have.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}, must be at least 1")
    classifier.check(training, "the classifier")
    channels = pipeline.vae.config.in_channels
    if channels != training.channels:
        raise ValueError(f"the pipeline generates {channels} channel(s), but the images have {training.channels}")
    classes = classifier.classes
    held_out = of_classes(held_out, classes)
    real, real_labels = _read(held_out, classes, progress)
    reference, real_guesses = classify(classifier, real)
    prompts = [name for name in classes for _ in range(per_class)]
    images = generate(pipeline, prompts, training.config.shape, seed, batch_size, progress, **options)
    generated, guesses = classify(classifier, torch.stack([to_bytes(to_pixels(image)) for image in images]))
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    floor, _ = classify(classifier, _read(training.some(len(images)), classes, progress)[0])
    return ClassFidelity(
        classes=classes,
        per_class=per_class,
        held_out=len(held_out),
        accuracy=_fraction(guesses == labels),
        accuracy_real=_fraction(real_guesses == real_labels),
        class_accuracy=_by_class(guesses == labels, labels, classes),
        class_accuracy_real=_by_class(real_guesses == real_labels, real_labels, classes),
        kid=kernel_inception_distance(generated, reference),
        kid_floor=kernel_inception_distance(floor, reference),
        images=images,
    )


def _fraction(hits: Tensor) -> float:
    return hits.double().mean().item()


def _by_class(hits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    return {name: _fraction(hits[labels == i]) for i, name in enumerate(classes) if (labels == i).any()}

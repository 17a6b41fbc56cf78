"""The training image nearest to a generated one, by pixels, and whether the generated one is a copy of it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latentdiff.config import UNetTrainingConfig, load_run_config
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.images import View, prepare, to_images
from latentdiff.serving.latest import Latest

SIDE = 32  # pixels, at which images are compared
MAX_IMAGES = 20_000  # of a run, in memory: 60 MB. Of a larger set a random subset is taken
MAX_SETS = 2  # in memory
COPY = 1 / 3  # Bonnaire et al. 2025, arXiv 2505.17638, section 2: nearest over second nearest distance
PART = 1000  # images compared at once


@dataclass(frozen=True)
class Nearest:
    """distance: root mean square difference of values 0 .. 255; second: that of the next image, None without one.

    The next image is the nearest one that differs from this one: a training set may have an image twice.
    """

    image: Image.Image
    caption: str
    distance: float
    second: float | None

    @property
    def is_copy(self) -> bool | None:
        """Whether the nearest is less than a third as far away as the second nearest; None without a second one."""
        return None if self.second is None else self.distance < COPY * self.second


class TrainingImages:
    """The training images of a run, each SIDE x SIDE in RGB in memory. total: how many there are in all."""

    def __init__(self, images: CaptionedImages) -> None:
        self.total = len(images)
        self.images = (images.some(MAX_IMAGES) if len(images) > MAX_IMAGES else images).in_one_shape()
        self.small = np.empty((len(self.images), SIDE * SIDE * 3), dtype=np.uint8)
        for i in range(len(self.images)):
            self.small[i] = _small(self._image(i))

    @classmethod
    def of_run(cls, run: Path) -> "TrainingImages":
        """Those that the run's config.yaml names; ValueError or OSError if they cannot be opened."""
        if not (run / "config.yaml").is_file():
            raise ValueError("there is no config.yaml that names them")
        config = load_run_config(run / "config.yaml")
        captioned = isinstance(config, UNetTrainingConfig)
        return cls(open_images(config.data, 3, config.train.seed, False, captions_needed=captioned)[0])

    def __len__(self) -> int:
        return len(self.images)

    def nearest(self, image: Image.Image) -> Nearest:
        """The nearest image. Where training flips images, each counts with its mirror image."""
        config = self.images.config
        height, width = config.shape
        image = prepare(image, (width, height), 3, config.background, View())
        squares = self._squares(_small(image))
        if config.flip:
            squares = np.minimum(squares, self._squares(_small(ImageOps.mirror(image))))
        first = int(squares.argmin())
        others = (self.small != self.small[first]).any(axis=1)
        distances = np.sqrt(squares / self.small.shape[1])
        second = float(distances[others].min()) if others.any() else None
        return Nearest(self._image(first), self.images.captions_of(first)[0], float(distances[first]), second)

    def _squares(self, values: np.ndarray) -> np.ndarray:
        """Sums of squared differences to each image, exact: [images]."""
        parts = [self.small[i : i + PART].astype(np.int32) - values for i in range(0, len(self.small), PART)]
        return np.concatenate([np.square(part).sum(axis=1) for part in parts])

    def _image(self, index: int) -> Image.Image:
        return to_images(self.images.pixels(index)[None])[0]


class TrainingSets:
    """The training images of the runs that were asked for last. One thread uses this."""

    def __init__(self) -> None:
        self._known: Latest[tuple[Path, int], TrainingImages] = Latest(MAX_SETS)

    def get(self, run: Path) -> TrainingImages:
        """The run's training images; ValueError or OSError as `TrainingImages.of_run`."""
        path = run / "config.yaml"
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        return self._known.get((run, changed), lambda: TrainingImages.of_run(run))


def _small(image: Image.Image) -> np.ndarray:
    """An RGB image's SIDE x SIDE values, flat, as int32."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int32).reshape(-1)

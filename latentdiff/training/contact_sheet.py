"""The first thing to look at in a run: a few of its training images as the model sees them, with their captions.

A run writes them at its start, as images.png and images.json.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.figures.grids import image_grid, padded, picture
from latentdiff.formats.files import read_json, write_json, write_png
from latentdiff.images import to_images

IMAGE_FILE, RECORD_FILE = "images.png", "images.json"
IMAGES = 16
COLUMNS = 4
SIDE = 160  # pixels of an image at most; small ones are enlarged to about half of that
TRAINED, HELD_OUT, NEW = "training caption", "held-out caption", "new"


@dataclass(frozen=True)
class ContactSheet:
    """What images.json says. captions: of the images in images.png, row by row; columns: images in a row.

    training, held_out: number of images. prompts: for each prompt of the sample grids, whether it is the caption of a
    training image, of a held-out image alone, or of neither (new); empty where captions are not trained.
    """

    captions: list[str]
    columns: int
    training: int
    held_out: int
    prompts: dict[str, str]

    @classmethod
    def load(cls, run: Path) -> Self | None:
        """A run's, None without one; ValueError if it is damaged."""
        path = run / RECORD_FILE
        if not path.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {error.errors()[0]['msg']}") from None


def write_contact_sheet(
    run: Path, images: CaptionedImages, held_out: CaptionedImages, prompts: tuple[str, ...] = ()
) -> None:
    """Write images.png and images.json: training images in their crops of the first epoch, the same in every run.

    prompts: of the sample grids. Raises OSError if an image cannot be read any more.
    """
    chosen = range(len(images))[:: max(1, len(images) // IMAGES)][:IMAGES]
    pictures = [_picture(images, index) for index in chosen]
    columns = min(COLUMNS, len(pictures))
    write_png(image_grid(padded(pictures), columns), run / IMAGE_FILE)
    captions = [images.caption(index, epoch=0) for index in chosen]
    sheet = ContactSheet(captions, columns, len(images), len(held_out), _known(prompts, images, held_out))
    write_json(asdict(sheet), run / RECORD_FILE)


def _picture(images: CaptionedImages, index: int) -> Image.Image:
    return picture(to_images(images.pixels(index, images.view(index, epoch=0))[None])[0], SIDE)


def _known(prompts: tuple[str, ...], images: CaptionedImages, held_out: CaptionedImages) -> dict[str, str]:
    """Where each prompt comes from, up to capitals and spaces, which the tokenizer does not see either."""
    if not images.captioned or not prompts:
        return {}
    trained, other = ({_plain(caption) for caption in one.distinct_captions} for one in (images, held_out))

    def origin(prompt: str) -> str:
        return TRAINED if _plain(prompt) in trained else HELD_OUT if _plain(prompt) in other else NEW

    return {prompt: origin(prompt) for prompt in prompts}


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())

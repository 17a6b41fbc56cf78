"""Images generated from the captions of training images, beside these images."""

import numpy as np
import pytest
import torch
from image_sets import noise_images
from tiny import tiny_pipeline

from latentdiff.evaluation.prompts import PromptFidelity, prompt_fidelity
from latentdiff.images import to_images, to_pixels


@pytest.mark.runs
def test_prompt_fidelity():
    pipeline, images = tiny_pipeline(), noise_images(7)
    result = prompt_fidelity(pipeline, images, num_prompts=3, seed=5, batch_size=2, progress=False)
    assert result.prompts == ["image 0", "image 2", "image 4"]  # spread over the set
    for place, index in enumerate([0, 2, 4]):
        assert np.array_equal(np.asarray(result.originals[place]), np.asarray(images.image(index)))
        # Each is what the pipeline generates for that caption and seed alone.
        alone = pipeline(f"image {index}", seed=5 + place, height=16, width=16, progress=False).images[0]
        difference = np.asarray(alone).astype(int) - np.asarray(result.generated[place])
        assert np.abs(difference).max() <= 1
        distances = [(to_pixels(result.generated[place]) - images.pixels(i)).square().sum() for i in range(7)]
        assert result.nearest[place] == f"image {int(torch.stack(distances).argmin())}"
    assert len({image.tobytes() for image in result.generated}) == 3
    for prompts in (0, 8):
        with pytest.raises(ValueError, match=rf"^{prompts} prompts asked for, must be in 1 \.\. 7"):
            prompt_fidelity(pipeline, images, prompts, 0, 2, progress=False)


def test_hits():
    (image,) = to_images(torch.zeros(1, 3, 2, 2))
    assert PromptFidelity(["a", "b", "c"], ["a", "a", "c"], [image] * 3, [image] * 3).hits == 2

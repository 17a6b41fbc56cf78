"""Image-to-image and inpainting: where sampling starts, and what a mask keeps."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from samples import PROMPT, array, difference, options

from latentdiff.pipeline import LatentDiffusionPipeline


def make_image(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def left_half_mask(size: tuple[int, int] = (16, 16)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_strength_zero_is_the_reconstruction(pipeline: LatentDiffusionPipeline) -> None:
    image = make_image()
    output = pipeline.image_to_image(PROMPT, image, 0.0, **options())
    latents = pipeline.encode([image])
    assert torch.equal(output.latents, latents)
    assert difference(output[0], pipeline.decode(latents)[0]) == 0


def test_a_strength_is_not_rounded_down(pipeline: LatentDiffusionPipeline) -> None:
    """0.58 * 50 is 28.999999999999996."""
    request = pipeline.request(PROMPT, {"num_inference_steps": 50})
    assert [request.after(strength).steps for strength in (0.58, 0.29, 0.5, 0.99)] == [29, 14, 25, 49]


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_strength_is_the_fraction_of_steps(pipeline: LatentDiffusionPipeline, strength: float, steps: int) -> None:
    seen: list[float] = []
    pipeline.image_to_image(
        PROMPT, make_image(), strength, **options(callback=lambda step, timestep, *_: seen.append(timestep))
    )
    assert seen == [999, 749, 499, 249][4 - steps :]


def test_image_to_image_equals_diffusers(pipeline: LatentDiffusionPipeline, tmp_path) -> None:
    """From given latents, as diffusers samples the posterior where we take its mean."""
    pipeline.save_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    image = make_image()
    ours = pipeline.image_to_image(PROMPT, image, 0.5, **options(seed=5, num_inference_steps=10))
    with torch.no_grad():
        latents = pipeline.encode([image])
    generator = torch.Generator().manual_seed(5)
    expected = theirs(
        PROMPT, image=latents, strength=0.5, num_inference_steps=10, guidance_scale=3.0, generator=generator
    ).images[0]
    assert difference(ours[0], expected) <= 2


def test_images_in_a_batch_are_those_alone(pipeline: LatentDiffusionPipeline) -> None:
    images = [make_image(seed=1), make_image(seed=2)]
    together = pipeline.image_to_image([PROMPT, "a boat"], images, 0.5, **options(seed=[7, 8]))
    for i, (prompt, seed) in enumerate([(PROMPT, 7), ("a boat", 8)]):
        alone = pipeline.image_to_image(prompt, images[i], 0.5, **options(seed=seed))
        assert difference(alone[0], together[i]) <= 1
    several = pipeline.image_to_image([PROMPT, "a boat"], images, 0.5, **options(num_images_per_prompt=2, seed=7))
    assert difference(several[0], together[0]) <= 1 and len(several) == 4


def test_images_are_fitted_when_a_size_is_given(pipeline: LatentDiffusionPipeline) -> None:
    tall = make_image((31, 47))
    output = pipeline.image_to_image(PROMPT, tall, 0.5, height=24, width=16, **options())
    assert output[0].size == (16, 24)
    fitted = ImageOps.fit(tall, (16, 24), Image.Resampling.LANCZOS)
    assert difference(output[0], pipeline.image_to_image(PROMPT, fitted, 0.5, **options())[0]) == 0
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    white = Image.new("RGB", (16, 16), "white")
    assert torch.equal(pipeline.encode([transparent]), pipeline.encode([white]))


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpm++2m", "unipc"])
def test_inpainting_keeps_what_is_not_masked(pipeline: LatentDiffusionPipeline, sampler: str) -> None:
    image, mask = make_image(), left_half_mask()
    output = pipeline.inpaint(PROMPT, image, mask, **options(sampler=sampler))
    values, original = array(output[0]), array(image)
    assert (values[:, 8:] == original[:, 8:]).all()
    assert np.abs(values[:, :8] - original[:, :8]).mean() > 20
    # The latents outside the mask are the image's own at the end, and the others are not.
    kept = pipeline.encode([image])
    assert torch.allclose(output.latents[..., 4:], kept[..., 4:], atol=1e-5)
    assert (output.latents[..., :4] - kept[..., :4]).abs().mean() > 0.1


def test_the_network_sees_the_known_part_at_each_level(pipeline: LatentDiffusionPipeline) -> None:
    """Outside the mask x is alpha * latents + sigma * one noise, at every step of a deterministic sampler."""
    image = make_image()
    kept = pipeline.encode([image])[..., 4:]
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))[..., 4:]
    seen: list[tuple[float, torch.Tensor]] = []
    pipeline.inpaint(
        PROMPT, image, left_half_mask(), **options(callback=lambda step, t, x, x0: seen.append((t, x[..., 4:])))
    )
    levels = [pipeline.schedule.level(t) for t in (749, 499, 249)]
    for (_, x), level in zip(seen, levels, strict=False):
        torch.testing.assert_close(x[0], level.alpha * kept[0] + level.sigma * noise, atol=1e-4, rtol=0)


def test_masks_are_upright_and_their_transparent_parts_black(pipeline: LatentDiffusionPipeline) -> None:
    image, mask = make_image(), left_half_mask()
    expected = pipeline.inpaint(PROMPT, image, mask, **options())[0]
    transparent = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    transparent.paste((255, 255, 255, 255), (0, 0, 8, 16))
    assert difference(pipeline.inpaint(PROMPT, image, transparent, **options())[0], expected) == 0
    turned = mask.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned.info["exif"] = turned.getexif().tobytes()
    assert difference(pipeline.inpaint(PROMPT, image, turned, **options())[0], expected) == 0
    sixteen = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    assert difference(pipeline.inpaint(PROMPT, image, sixteen, **options())[0], expected) == 0


def test_full_strength_gives_up_what_was_under_the_mask(pipeline: LatentDiffusionPipeline) -> None:
    image = make_image()
    painted = image.copy()
    painted.paste((255, 0, 0), (0, 0, 8, 16))
    first, other = (pipeline.inpaint(PROMPT, i, left_half_mask(), **options()).latents for i in (image, painted))
    partly = pipeline.inpaint(PROMPT, painted, left_half_mask(), 0.75, **options()).latents
    gap, partial_gap = ((x[..., :3] - first[..., :3]).abs().mean().item() for x in (other, partly))
    # What is left is the known part's, whose latents see a little of the paint.
    assert gap < 0.5 * partial_gap


def test_grey_masks_mix(pipeline: LatentDiffusionPipeline) -> None:
    image, grey = make_image(), Image.new("L", (16, 16), 51)  # a fifth
    mixed = array(pipeline.inpaint(PROMPT, image, grey, **options())[0])
    new = array(pipeline.inpaint(PROMPT, image, Image.new("L", (16, 16), 255), **options())[0])
    assert np.abs(mixed - (0.2 * new + 0.8 * array(image))).max() <= 1


@pytest.mark.parametrize(
    ("size", "fitted"), [((1200, 800), (20, 12)), ((36, 32), (16, 16)), ((18, 16), (16, 16)), ((300, 2), (196, 4))]
)
def test_an_image_of_an_unsuitable_size_is_scaled(
    pipeline: LatentDiffusionPipeline, size: tuple[int, int], fitted: tuple[int, int]
) -> None:
    """To the trained 16x16 pixels in its own shape, in multiples of 4."""
    with pytest.warns(UserWarning, match=rf"is {size[0]}x{size[1]}, the model was trained on 16x16: .*multiples of 4"):
        output = pipeline.image_to_image(PROMPT, make_image(size), 0.5, **options())
    assert output[0].size == fitted
    expected = pipeline.image_to_image(PROMPT, make_image(size), 0.5, width=fitted[0], height=fitted[1], **options())
    assert difference(output[0], expected[0]) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 64)])
def test_an_image_of_another_size_that_suits_keeps_it(pipeline: LatentDiffusionPipeline, size: tuple[int, int]) -> None:
    assert pipeline.image_to_image(PROMPT, make_image(size), 0.5, **options())[0].size == size


def test_a_large_image_to_repaint_is_warned_of(pipeline: LatentDiffusionPipeline) -> None:
    with pytest.warns(UserWarning, match="the image is 48x32, the model was trained on 16x16: repainting takes long"):
        output = pipeline.inpaint(PROMPT, make_image((48, 32)), left_half_mask((48, 32)), **options())
    assert output[0].size == (48, 32)


WRONG_IMAGES = [
    ("image_to_image", {"strength": 1.5}, r"strength is 1.5, must be in 0 \.\. 1"),
    ("image_to_image", {"strength": -0.1}, r"strength is -0.1, must be in 0 \.\. 1"),
    ("inpaint", {"image": make_image((18, 16))}, "width is 18, must be a multiple of 4"),
    ("image_to_image", {"image": "a.png"}, "image 0 is of type str, must be a PIL image"),
    ("image_to_image", {"image": None}, "image 0 is of type NoneType, must be a PIL image"),
    ("image_to_image", {"strength": None}, r"strength is None, must be in 0 \.\. 1"),
    ("image_to_image", {"num_images_per_prompt": None}, "num_images_per_prompt is None, must be given or left out"),
    ("image_to_image", {"clip_skip": None}, "clip_skip is None, must be given or left out"),
    ("image_to_image", {"strength": "0.5"}, "strength is '0.5', must be a number"),
    ("image_to_image", {"height": 0}, "height is 0, must be a multiple of 4"),
    ("image_to_image", {"image": [make_image()] * 3}, "image has 3 images, but there are 2 prompts"),
    ("image_to_image", {"image": [make_image(), make_image((20, 16))]}, "the images have several sizes, must be one"),
    ("inpaint", {"mask": left_half_mask((20, 16))}, "mask 0 is 20x16, must be 16x16"),
    ("inpaint", {"mask": Image.new("L", (16, 16), 0)}, "mask 0 is black all over, must be white where"),
    ("inpaint", {"mask": [left_half_mask()] * 3}, "mask has 3 images, but there are 2 prompts"),
]


@pytest.mark.parametrize(("method", "changes", "message"), WRONG_IMAGES)
def test_wrong_images_are_named(pipeline: LatentDiffusionPipeline, method: str, changes: dict, message: str) -> None:
    given = {"image": make_image()} | ({"mask": left_half_mask()} if method == "inpaint" else {}) | changes
    with pytest.raises(ValueError, match=message):
        getattr(pipeline, method)([PROMPT, "a boat"], **given, progress=False)

"""Guidance, image-to-image, inpainting, interpolation, variations, batches and callbacks of the pipeline."""

import copy
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import UNET, normal, perturb, tiny_pipeline, tiny_unet

from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.models.layers import ProjectedContext
from latentdiff.pipeline import LatentDiffusionPipeline, NonFiniteError
from latentdiff.pipeline.guidance import Guidance, GuidedDenoiser
from latentdiff.pipeline.options import Options
from latentdiff.pipeline.preview import LatentPreview
from latentdiff.pipeline.start import slerp

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def pipeline() -> LatentDiffusionPipeline:
    """Shared: a test must leave it as it was."""
    return tiny_pipeline()


def options(**changes: object) -> dict:
    return {"seed": 1, "num_inference_steps": 4, "guidance_scale": 3.0, "progress": False} | changes


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(array(a) - array(b)).max())


def make_image(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def left_half_mask(size: tuple[int, int] = (16, 16)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def test_projected_context_is_the_context() -> None:
    unet = tiny_unet()
    x, t, context = normal(2, 4, 8, 8), torch.tensor([3, 800]), normal(2, 77, 16, seed=1)
    with torch.no_grad():
        expected = unet(x, t, context)
        projected = unet.project(context)
        torch.testing.assert_close(unet(x, t, projected), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(unet(x[:1], t[:1], projected.first(1)), expected[:1], atol=1e-5, rtol=0)
    assert isinstance(projected, ProjectedContext)
    assert len(projected.pairs) == sum(name.endswith("attn2") for name, _ in unet.named_modules()) > 1
    with pytest.raises(ValueError, match="context is 8 wide, the UNet's cross_attention_dim is 16"):
        unet.project(normal(1, 77, 8))


def test_text_is_encoded_and_projected_once(pipeline: LatentDiffusionPipeline) -> None:
    """Not once a step: the work that does not change is done before the loop."""
    counts = {"text": 0, "keys": 0, "unet": 0}

    def counting(name: str):
        def hook(*_: object) -> None:
            counts[name] += 1

        return hook

    attention = next(module for name, module in pipeline.unet.named_modules() if name.endswith("attn2"))
    hooks = [
        pipeline.text_encoder.register_forward_hook(counting("text")),
        attention.to_k.register_forward_hook(counting("keys")),
        pipeline.unet.register_forward_hook(counting("unet")),
    ]
    try:
        pipeline([PROMPT, "a boat"], **options(num_inference_steps=5))
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {"text": 1, "keys": 1, "unet": 5}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_equals_diffusers(rescale: float) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    conditional, unconditional = normal(3, 4, 8, 8, seed=1), 0.5 * normal(3, 4, 8, 8, seed=2) + 1
    guided = unconditional + 7.5 * (conditional - unconditional)
    expected = rescale_noise_cfg(guided, conditional, guidance_rescale=rescale) if rescale else guided
    torch.testing.assert_close(Guidance(7.5, rescale).apply(conditional, unconditional), expected)


def test_rescaled_guidance_has_the_spread_of_the_prompts_branch() -> None:
    conditional, unconditional = normal(2, 4, 8, 8, seed=1), normal(2, 4, 8, 8, seed=2)
    guided = Guidance(5.0, 1.0).apply(conditional, unconditional)
    torch.testing.assert_close(guided.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    assert Guidance(5.0).apply(conditional, unconditional).std() > 3


def test_guidance_interval_leaves_out_the_other_branch(pipeline: LatentDiffusionPipeline) -> None:
    sizes: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        levels = [pipeline.schedule.level(t).sigma_karras for t in (999, 749, 499, 249)]
        between = (levels[2], levels[1])  # the lower end is not in it
        output = pipeline(PROMPT, **options(guidance_interval=between))
        assert sizes == [1, 2, 1, 1]
        sizes.clear()
        everywhere = pipeline(PROMPT, **options(guidance_interval=(0.0, math.inf)))
        assert sizes == [2, 2, 2, 2]
    finally:
        hook.remove()
    assert difference(everywhere[0], pipeline(PROMPT, **options())[0]) == 0
    assert difference(output[0], everywhere[0]) > 1
    nowhere = pipeline(PROMPT, **options(guidance_interval=(1e6, 1e7)))
    assert difference(nowhere[0], pipeline(PROMPT, **options(guidance_scale=1.0))[0]) <= 1


def test_denoiser_at_a_level_between_timesteps() -> None:
    """x0 of the UNet at a real timestep, with that level's alpha and sigma."""
    unet, schedule = tiny_unet(), NoiseSchedule(prediction_type="v_prediction")
    x, context, empty = normal(1, 4, 8, 8), normal(1, 77, 16, seed=1), normal(1, 77, 16, seed=2)
    level = NoiseLevel(412.25, 0.8, 0.6)
    with torch.no_grad():
        x0 = GuidedDenoiser(unet, schedule, context, empty, Guidance(2.0))(x, level)
        t = torch.tensor([412.25])
        v = 2 * unet(x, t, context) - unet(x, t, empty)
    torch.testing.assert_close(x0, 0.8 * x - 0.6 * v, atol=1e-5, rtol=0)


def test_real_timesteps_equal_diffusers() -> None:
    theirs = perturb(diffusers.UNet2DConditionModel(**UNET)).eval()
    ours = tiny_unet()
    ours.load_state_dict(theirs.state_dict())
    x, context = normal(1, 4, 8, 8), normal(1, 77, 16, seed=1)
    with torch.no_grad():
        expected = theirs(x, torch.tensor(412.25), context).sample
        torch.testing.assert_close(ours(x, torch.tensor([412.25]), context), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts: given states, weights, skipped layers


def test_given_states_are_those_of_the_prompt(pipeline: LatentDiffusionPipeline) -> None:
    expected = pipeline([PROMPT, "a boat"], negative_prompt="blue", **options())
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompts([PROMPT, "a boat"]), pipeline.encode_prompts(["blue"] * 2)
    given = pipeline(prompt_embeds=embeds, negative_prompt_embeds=negative, **options())
    assert all(difference(a, b) <= 1 for a, b in zip(given, expected, strict=True))
    assert difference(pipeline(prompt_embeds=embeds[:1], negative_prompt="blue", **options())[0], expected[0]) <= 1
    with pytest.raises(ValueError, match="prompt_embeds have 10 tokens, those of the negative prompt 77"):
        pipeline(prompt_embeds=embeds[:1, :10], **options())


def test_given_states_of_a_long_prompt(pipeline: LatentDiffusionPipeline) -> None:
    """The empty negative prompt is filled up with empty chunks, as where the prompt is a text."""
    long = "red " * 100
    embeds = pipeline.encode_prompts([long])
    assert embeds.shape[1] == 2 * 77 and not embeds.requires_grad
    assert difference(pipeline(prompt_embeds=embeds, **options())[0], pipeline(long, **options())[0]) <= 1


def test_weights_and_skipped_layers_have_a_say(pipeline: LatentDiffusionPipeline) -> None:
    plain = pipeline(PROMPT, **options())[0]
    assert difference(pipeline("a (red:1.0) apple", **options())[0], plain) <= 1
    assert difference(pipeline("a (red:4) apple", **options())[0], plain) > 1
    assert difference(pipeline(PROMPT, **options(clip_skip=1))[0], plain) > 1


# ----------------------------------------------------------------------------------------------------------------------
# From an image


def test_strength_zero_is_the_reconstruction(pipeline: LatentDiffusionPipeline) -> None:
    image = make_image()
    output = pipeline.image_to_image(PROMPT, image, 0.0, **options())
    latents = pipeline.encode([image])
    assert torch.equal(output.latents, latents)
    assert difference(output[0], pipeline.decode(latents)[0]) == 0


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_strength_is_the_share_of_steps(pipeline: LatentDiffusionPipeline, strength: float, steps: int) -> None:
    seen: list[float] = []
    pipeline.image_to_image(
        PROMPT, make_image(), strength, **options(callback=lambda step, timestep, *_: seen.append(timestep))
    )
    assert seen == [999, 749, 499, 249][4 - steps :]


def test_image_to_image_equals_diffusers(pipeline: LatentDiffusionPipeline, tmp_path) -> None:
    """From given latents, as diffusers would draw them from the posterior where we take its mean."""
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


WRONG_IMAGES = [
    ("image_to_image", {"strength": 1.5}, r"strength is 1.5, must be in 0 \.\. 1"),
    ("image_to_image", {"strength": -0.1}, r"strength is -0.1, must be in 0 \.\. 1"),
    ("image_to_image", {"image": make_image((18, 16))}, "width is 18, must be a multiple of 4"),
    ("image_to_image", {"image": "a.png"}, "image 0 is of type str, must be a PIL image"),
    ("image_to_image", {"image": None}, "image 0 is of type NoneType, must be a PIL image"),
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


# ----------------------------------------------------------------------------------------------------------------------
# Between images


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * math.pi / 2
        expected = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(a, b, share), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    noise = normal(4, 32, 32, seed=1), normal(4, 32, 32, seed=2)
    assert slerp(*noise, 0.5).std() == pytest.approx(1, abs=0.03)  # a straight line would have 0.71


def test_interpolation_ends_at_the_two_images(pipeline: LatentDiffusionPipeline) -> None:
    common = options(negative_prompt="blue")
    del common["seed"]
    output = pipeline.interpolate((PROMPT, "green boat at night"), (3, 9), 5, **common)
    assert len(output) == 5
    assert difference(output[0], pipeline(PROMPT, seed=3, **common)[0]) <= 1
    assert difference(output[4], pipeline("green boat at night", seed=9, **common)[0]) <= 1
    steps = [np.abs(array(a) - array(b)).mean() for a, b in zip(output, output[1:], strict=False)]
    assert max(steps) < np.abs(array(output[0]) - array(output[4])).mean()


def test_variations(pipeline: LatentDiffusionPipeline) -> None:
    common = options()
    del common["seed"]
    base = pipeline(PROMPT, seed=3, **common)[0]
    same = pipeline.variations(PROMPT, 3, 2, 0.0, **common)
    assert all(difference(image, base) <= 1 for image in same)
    near, far = (pipeline.variations(PROMPT, 3, 4, amount, **common) for amount in (0.1, 1.0))
    distances = [np.mean([np.abs(array(i) - array(base)).mean() for i in images]) for images in (near, far)]
    assert 0 < distances[0] < 0.6 * distances[1]
    others = pipeline(PROMPT, seed=[4, 5, 6, 7], num_images_per_prompt=4, **common)
    assert all(difference(a, b) <= 1 for a, b in zip(far, others, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.interpolate(("a",), (1, 2)), "prompts is .*, must be two: where to start and"),
        (lambda p: p.interpolate(("a", "b"), (1, 2, 3)), "is .*, must be two: where to start and where to end"),
        (lambda p: p.interpolate("ab", (1, 2)), "is .*, must be two: where to start and where to end"),
        (lambda p: p.interpolate(("a", "b"), (1, 2), 1), "frames is 1, must be at least 2"),
        (lambda p: p.variations("a", 1, 0), "count is 0, must be at least 1"),
        (lambda p: p.variations("a", 1, 2, 1.5), r"amount is 1.5, must be in 0 \.\. 1"),
    ],
)
def test_wrong_ways_between_images(pipeline: LatentDiffusionPipeline, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_interpolation_goes_between_negative_prompts_too(pipeline: LatentDiffusionPipeline) -> None:
    common = options()
    del common["seed"]
    output = pipeline.interpolate((PROMPT, "a boat"), (3, 9), 3, negative_prompt=["blue", "green fox"], **common)
    for frame, prompt, seed, negative in [(0, PROMPT, 3, "blue"), (2, "a boat", 9, "green fox")]:
        assert difference(output[frame], pipeline(prompt, seed=seed, negative_prompt=negative, **common)[0]) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Memory, cancelling, what must not become an image


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_sequential_batches_give_the_same_images(pipeline: LatentDiffusionPipeline, sampler: str) -> None:
    prompts = [PROMPT, "a boat", "a fox"]
    sizes: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        parts = pipeline(prompts, **options(batch_size=2, sampler=sampler))
    finally:
        hook.remove()
    assert sizes == [4] * 4 + [2] * 4
    whole = pipeline(prompts, **options(sampler=sampler))
    assert parts.seeds == whole.seeds and parts.latents.shape == whole.latents.shape
    assert all(difference(a, b) <= 1 for a, b in zip(parts, whole, strict=True))


def test_tiles_have_a_say(pipeline: LatentDiffusionPipeline) -> None:
    whole = pipeline(PROMPT, height=32, width=32, **options())
    tiled = pipeline(PROMPT, height=32, width=32, **options(tile=8))
    assert torch.equal(whole.latents, tiled.latents)  # only the decoder works in tiles
    assert difference(pipeline(PROMPT, height=32, width=32, **options(tile=16))[0], whole[0]) == 0
    assert 0 < difference(tiled[0], whole[0])


def test_a_callback_can_cancel(pipeline: LatentDiffusionPipeline) -> None:
    class Enough(Exception):
        pass

    seen: list[int] = []

    def stop(step: int, *_: object) -> None:
        seen.append(step)
        if step == 1:
            raise Enough

    with pytest.raises(Enough):
        pipeline(PROMPT, **options(callback=stop))
    assert seen == [0, 1]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_preview_of_the_estimate(pipeline: LatentDiffusionPipeline) -> None:
    preview = pipeline.latent_preview()
    sizes = []
    pipeline(PROMPT, **options(callback=lambda step, t, x, x0: sizes.append(preview(x0)[0].size)))
    assert sizes == [(16, 16)] * 4
    assert pipeline.latent_preview() is preview  # fitted once


def test_a_preview_of_the_folder_is_used(pipeline: LatentDiffusionPipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    known = LatentPreview(torch.eye(3, 4), torch.zeros(3), 2, 0.5)
    known.save(tmp_path / "vae")
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path).latent_preview()
    assert torch.equal(opened.weights, known.weights) and opened.factor == 2


def test_black_and_broken_images_are_errors(pipeline: LatentDiffusionPipeline) -> None:
    broken = copy.deepcopy(pipeline)
    with torch.no_grad():
        broken.vae.decoder.conv_out.weight.zero_()
        broken.vae.decoder.conv_out.bias.fill_(-2.0)
    with pytest.raises(NonFiniteError, match="image 0 is black all over with torch.float32; move the pipeline"):
        broken(PROMPT, **options())
    with pytest.raises(NonFiniteError, match="image 0 is black"):
        broken([PROMPT] * 2, **options(batch_size=1))
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[1] = 0.5  # green alone
    assert array(broken(PROMPT, **options())[0])[..., 1].min() > 150
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="image 0 is not finite after the autoencoder"):
        broken(PROMPT, **options())


def test_every_option_is_told() -> None:
    """The docstring of Options names each of its fields."""
    for name in Options.__dataclass_fields__:
        if name not in ("num_images_per_prompt", "progress"):
            assert name in Options.__doc__, name


def test_compiled_draws_the_same(pipeline: LatentDiffusionPipeline) -> None:
    compiled = copy.deepcopy(pipeline).compile(backend="aot_eager")
    expected = pipeline(PROMPT, **options(guidance_interval=(0.5, 3.0)))
    assert difference(compiled(PROMPT, **options(guidance_interval=(0.5, 3.0)))[0], expected[0]) <= 1

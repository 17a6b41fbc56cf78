"""Options of a generation: given states, batches, tiles, callbacks, and what must not become an image."""

import copy
import math

import pytest
import torch
from samples import PROMPT, array, difference, options

from latentdiff.config import Compile
from latentdiff.pipeline import LatentDiffusionPipeline, NonFiniteError
from latentdiff.pipeline.options import Options


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


def test_weights_and_skipped_layers_change_the_image(pipeline: LatentDiffusionPipeline) -> None:
    plain = pipeline(PROMPT, **options())[0]
    assert difference(pipeline("a (red:1.0) apple", **options())[0], plain) <= 1
    assert difference(pipeline("a (red:4) apple", **options())[0], plain) > 1
    assert difference(pipeline(PROMPT, **options(clip_skip=1))[0], plain) > 1


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


def test_tiles_change_the_image(pipeline: LatentDiffusionPipeline) -> None:
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


def test_every_option_is_documented() -> None:
    """The docstring of Options names each of its fields."""
    for name in Options.__dataclass_fields__:
        if name not in ("num_images_per_prompt", "progress"):
            assert name in Options.__doc__, name


@pytest.mark.runs
@pytest.mark.parametrize("how", ["blocks", "step"])
def test_compiled_pipeline_generates_equal_images(pipeline: LatentDiffusionPipeline, how: Compile) -> None:
    compiled = copy.deepcopy(pipeline).compile(how, backend="aot_eager")
    expected = pipeline(PROMPT, **options(guidance_interval=(0.5, 3.0)))
    assert difference(compiled(PROMPT, **options(guidance_interval=(0.5, 3.0)))[0], expected[0]) <= 1

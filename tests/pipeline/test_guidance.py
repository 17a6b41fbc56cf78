"""Guidance: both branches in one call, parity with diffusers, rescaling, intervals, levels between timesteps."""

import math

import diffusers
import pytest
import torch
from samples import PROMPT, difference, options
from tiny import UNET, normal, perturb, tiny_unet

from latentdiff.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentdiff.models.layers import ProjectedContext
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.guidance import Guidance, GuidedDenoiser


@pytest.mark.parametrize("changes", [{}, {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}])
def test_projected_context_is_the_context(changes: dict) -> None:
    unet = tiny_unet(**changes)
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


def test_time_embedding_is_the_timesteps() -> None:
    """Made beforehand it gives the same bits, with and without guidance, at known levels and at others."""
    unet, schedule = tiny_unet(), NoiseSchedule()
    x, t, context = normal(2, 4, 8, 8), torch.tensor([3, 800]), normal(2, 77, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(unet(x, unet.embed(t), context), unet(x, t, context))
        levels = [schedule.level(t) for t in (900, 500, 100)]
        guidance = Guidance(3.0, interval=(0.0, levels[1].sigma_karras))
        calls: list[int] = []
        unet.time_embedding.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
        known = GuidedDenoiser(unet, schedule, context, -context, guidance, levels=levels[:2])
        assert calls == [2, 4]
        results = [known(x, level) for level in levels]
        assert calls == [2, 4, 4]
        unknown = GuidedDenoiser(unet, schedule, context, -context, guidance)
        for result, level in zip(results, levels, strict=True):
            assert torch.equal(result, unknown(x, level))


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


def test_clipped_denoiser_clamps_finite_values_and_keeps_the_others() -> None:
    unet, schedule = tiny_unet(), NoiseSchedule(prediction_type="sample")
    x, context = 5 * normal(1, 4, 8, 8), normal(1, 77, 16, seed=1)
    level = schedule.level(500)
    with torch.no_grad():
        plain = GuidedDenoiser(unet, schedule, context, None, Guidance())(x, level)
        unet.conv_out.weight *= 4 / plain.abs().max()  # some values outside [-1, 1], some inside
        unet.conv_out.bias *= 4 / plain.abs().max()
        plain = GuidedDenoiser(unet, schedule, context, None, Guidance())(x, level)
        clipped = GuidedDenoiser(unet, schedule, context, None, Guidance(), clip_sample=True)(x, level)
        assert plain.max() > 1 and plain.min() < -1 and plain.abs().min() < 1
        assert torch.equal(clipped, plain.clamp(-1, 1))
        for value in (math.inf, -math.inf, math.nan):  # clamp alone would turn infinities into white or black
            unet.conv_out.bias[0] = value
            broken = GuidedDenoiser(unet, schedule, context, None, Guidance(), clip_sample=True)(x, level)
            assert not broken[:, 0].isfinite().any()
            assert torch.equal(broken[:, 1:], clipped[:, 1:])

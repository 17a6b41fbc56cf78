"""The inputs of stage 2's loss: each a function of (seed, step, sample index)."""

import pytest
import torch
from accelerate import Accelerator
from scripts import TINY_UNET
from tiny import normal, tiny_text_encoder, tiny_vae, tokenizer

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.batches import Batch
from latentdiff.randomness import Stream, logit_normal_quantiles, spread_timesteps
from latentdiff.randomness import normal as noise_of
from latentdiff.training.unet_inputs import Inputs, UNetInputs, caption_dropout_at


def make_inputs(accelerator: Accelerator, *overrides: str) -> UNetInputs:
    config = load_config(UNetTrainingConfig, TINY_UNET[0], [*TINY_UNET[1:], "vae=unused", *overrides])
    return UNetInputs(config, tiny_vae(), tokenizer(), tiny_text_encoder(), accelerator)


def batch(step: int, samples: range) -> Batch:
    """Cached moments and captions that depend on the sample index alone."""
    moments = torch.stack([normal(8, 8, 8, seed=sample) for sample in samples])
    captions = [f"caption {sample}" for sample in samples]
    return Batch(index=list(samples), step=step, sample_indices=list(samples), moments=moments, captions=captions)


def test_inputs_do_not_depend_on_how_a_batch_is_split(accelerator):
    inputs = make_inputs(accelerator, "train.offset_noise=0.3", "train.caption_dropout=0.5")
    whole = inputs(batch(5, range(8)))
    parts = [inputs(batch(5, range(first, first + 2))) for first in (0, 2, 4, 6)]
    for name, value in whole._asdict().items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name
    other = inputs(batch(6, range(8)))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_density_of_the_timesteps(accelerator):
    """The config's density; the other inputs stay."""
    plain = make_inputs(accelerator)(batch(5, range(8)))
    keys = ("train.timestep_density=logit_normal", "train.logit_mean=0.5", "train.logit_std=0.7")
    middle = make_inputs(accelerator, *keys)(batch(5, range(8)))
    expected = spread_timesteps(1000, 0, 5, range(8), 8, logit_normal_quantiles(0.5, 0.7))
    assert torch.equal(middle.timesteps, expected) and not torch.equal(middle.timesteps, plain.timesteps)
    assert all(torch.equal(a, b) for a, b in zip(middle[:3], plain[:3], strict=True))


def test_latents_are_a_sample_of_the_posterior(accelerator):
    inputs, micro_batch = make_inputs(accelerator), batch(3, range(4))
    expected = tiny_vae().sample(micro_batch["moments"], noise_of((4, 8, 8), 0, Stream.POSTERIOR, 3, range(4)))
    assert torch.equal(inputs(micro_batch).latents, expected)


@pytest.mark.runs
def test_offset_noise_shifts_each_channel(accelerator):
    """What is added to the noise is one number per channel and image, of the given standard deviation."""
    noise = {
        offset: torch.cat(
            [make_inputs(accelerator, f"train.offset_noise={offset}")(batch(s, range(8))).noise for s in range(40)]
        )
        for offset in (0.0, 0.5)
    }
    assert noise[0.0].shape == (320, 4, 8, 8)
    shift = noise[0.5] - noise[0.0]
    assert (shift - shift.mean(dim=(2, 3), keepdim=True)).abs().max() < 1e-5
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)
    assert shift[:, :, 0, 0].mean().abs() < 0.05


def test_blank_inputs_have_the_shapes_of_a_micro_batch(accelerator):
    inputs = make_inputs(accelerator)
    real, blank = inputs(batch(0, range(3))), inputs.blank(3, (16, 16))
    assert isinstance(blank, Inputs)
    assert [(x.shape, x.dtype) for x in blank] == [(x.shape, x.dtype) for x in real]


def test_caption_dropout_over_the_steps():
    """A single fraction is constant, a pair is linear and reaches its second value at the last step."""
    assert [caption_dropout_at(step, 4, 0.3) for step in range(4)] == [0.3] * 4
    fractions = [caption_dropout_at(step, 10, (1.0, 0.1)) for step in range(12)]
    assert fractions == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], rel=1e-12)
    assert caption_dropout_at(0, 1, (1.0, 0.1)) == 1.0

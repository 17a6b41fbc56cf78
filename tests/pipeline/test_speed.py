"""How a pipeline's networks compute: layout, products in bfloat16, and what switches them off."""

from pathlib import Path

import pytest
import torch
from single_files import small_sd
from tiny import VAE, normal, perturb, tiny_unet
from torch import nn

from latentdiff.commands.common import open_pipeline
from latentdiff.config import AutoencoderKLConfig
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixel_space import PixelSpace
from latentdiff.pipeline import LatentDiffusionPipeline, speed
from latentdiff.pipeline.speed import bf16_suffices, decode, decoder_layout, lay_out


def autoencoder(*widths: int) -> AutoencoderKL:
    config = AutoencoderKLConfig.from_diffusers(VAE | {"block_out_channels": list(widths)}, "a test")
    vae = AutoencoderKL.from_config(config, 0)
    perturb(vae, scale=0.02)
    return vae.eval()


@pytest.fixture(autouse=True)
def _fast_bf16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "computes_in_bf16", lambda device: True)
    with torch.no_grad():
        yield


def test_wide_decoders_multiply_in_bf16_and_sum_in_float32() -> None:
    vae, latents = autoencoder(128, 256), normal(2, 4, 8, 8)
    expected = vae.decode(latents)
    types: dict[str, tuple[torch.dtype, torch.dtype]] = {}

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            types[name] = inputs[0].dtype, output.dtype

        return hook

    for name, module in vae.decoder.named_modules():
        module.register_forward_hook(note(name))
    pixels = decode(vae, latents, None, None, exact=False)

    half, single = torch.bfloat16, torch.float32
    assert types["mid_block.resnets.0.conv2"][1] == types["up_blocks.0.resnets.0.conv1"][1] == half
    assert types["mid_block.attentions.0.to_q"][1] == half
    blocks = [name for name in types if name.rpartition(".")[0].endswith(("resnets", "attentions", "upsamplers"))]
    assert len(blocks) == 2 + 1 + 2 * 2 + 1  # middle, its attention, two levels, the upsampling between them
    assert {types[name] for name in blocks} == {(single, single)}
    assert types["conv_in"] == types["conv_norm_out"] == types["conv_out"] == (single, single)

    error = (pixels - expected).std() / expected.std()
    assert pixels.dtype == single and 1e-4 < error < 0.01  # bfloat16 has 8 bits of mantissa
    one_by_one = decode(vae, latents, 1, None, exact=False)  # in parts it is the same decoder
    torch.testing.assert_close(one_by_one, pixels, atol=0.03, rtol=0)
    assert (one_by_one - expected).std() / expected.std() > 1e-4


def test_exact_decoding_is_the_models_own_to_float32_rounding() -> None:
    vae, latents = autoencoder(128, 256), normal(1, 4, 8, 8)
    pixels, expected = normal(1, 3, 16, 16, seed=1), vae.decode(latents)
    moments = vae.encode(pixels)
    torch.testing.assert_close(decode(vae, latents, None, None, exact=True), expected, atol=1e-5, rtol=1e-5)
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert vae.encoder.conv_out.weight.is_contiguous()
    assert torch.equal(vae.encode(pixels), moments)  # decoding leaves the encoder's bits alone


def test_where_bf16_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16_suffices(autoencoder(128, 256))
    assert not bf16_suffices(autoencoder(64, 256))
    assert not bf16_suffices(autoencoder(128, 256).to(torch.float16))
    assert not bf16_suffices(autoencoder(128, 256).to("meta"))
    assert not bf16_suffices(PixelSpace(3))
    monkeypatch.setattr(speed, "computes_in_bf16", lambda device: False)
    assert not bf16_suffices(autoencoder(128, 256))


def test_layout() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert decoder_layout(cpu, torch.float32) == decoder_layout(gpu, torch.float16) == torch.channels_last
    assert decoder_layout(gpu, torch.float32) == torch.contiguous_format


@pytest.mark.parametrize(
    ("width", "dtype", "layout"),
    [
        (320, torch.bfloat16, torch.channels_last),
        (320, torch.float32, torch.contiguous_format),
        (64, torch.bfloat16, torch.contiguous_format),
    ],
)
def test_layout_of_unets(width: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    unet = tiny_unet(block_out_channels=[width, width]).to(dtype)
    x, t, context = normal(1, 4, 8, 8).to(dtype), torch.tensor([500]), normal(1, 5, 16, seed=1).to(dtype)
    expected = unet(x, t, context).float()
    lay_out(unet)
    weight = unet.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=layout)
    torch.testing.assert_close(unet(x, t, context).float(), expected, atol=0.05 * expected.std().item(), rtol=0)


def test_a_type_that_is_asked_for_is_the_only_one(pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert not opened.exact_decoding and not opened.to("cpu").exact_decoding
    assert opened.to(dtype=torch.float32).exact_decoding
    assert LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32).exact_decoding
    for dtype, exact in [("auto", False), ("float32", True)]:
        at_command = open_pipeline(str(tmp_path), "cpu", dtype)
        assert at_command.exact_decoding == exact and at_command.dtype == torch.float32


@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_files_in_float16_are_computed_in_float32(kind: str, tmp_path: Path) -> None:
    """Unless another type is asked for, or that of the files."""
    place = tmp_path / ("sd1.safetensors" if kind == "single file" else "sd1")
    opener = LatentDiffusionPipeline.from_pretrained
    if kind == "single file":
        opener = LatentDiffusionPipeline.from_single_file
        small_sd("sd1").to(dtype=torch.float16).save_single_file(place)
    else:
        small_sd("sd1").to(dtype=torch.float16).save_pretrained(place)
    for dtype, expected in [("auto", torch.float32), (None, torch.float16), (torch.bfloat16, torch.bfloat16)]:
        opened = opener(place, dtype=dtype)
        assert {p.dtype for part in (opened.unet, opened.vae) for p in part.parameters()} == {expected}
        assert {p.dtype for p in opened.text_encoder.parameters()} == {torch.float32 if dtype is None else expected}
        assert opened.exact_decoding == (dtype == torch.bfloat16)
    stored, computed = opener(place, dtype=None).unet.state_dict(), opener(place).unet.state_dict()
    assert all(torch.equal(value.float(), computed[name]) for name, value in stored.items())
    assert opener(place, torch_dtype=torch.float16).unet.dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype is None and torch_dtype is torch.float16: give one of them"):
        opener(place, dtype=None, torch_dtype=torch.float16)

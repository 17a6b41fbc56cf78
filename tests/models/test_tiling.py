"""The autoencoder in parts: slices are exact; tiles are where they should be, blended, and near the whole."""

from pathlib import Path

import pytest
import torch
from tiny import VAE, perturb
from torch import Tensor, nn

from latentdiff.config import AutoencoderKLConfig, DataConfig
from latentdiff.data.captioned_images import open_images
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.tiling import blending_weights, decode_in_parts, encode_in_parts, tile_starts

F = 2  # the tiny autoencoder's downsampling


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_vae(*, attention: bool = True) -> AutoencoderKL:
    config = AutoencoderKLConfig.model_validate(VAE | {"mid_block_add_attention": attention})
    return perturb(AutoencoderKL.from_config(config, seed=0)).eval()


def local_vae() -> AutoencoderKL:
    """Without what couples the whole image, attention and normalisation: a pixel depends on those near it."""
    vae = random_vae(attention=False)
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


def pointwise_vae() -> AutoencoderKL:
    """Local, with kernels that are zero around their centre: an f x f block depends on its own latent alone."""
    vae = local_vae()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            centre = module.weight[:, :, 1, 1].clone()
            module.weight.zero_()
            module.weight[:, :, 1, 1] = centre
    return vae


# --- where tiles are, and how they are weighed ---


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (8, 8, 0.25, [0]),
        (5, 8, 0.25, [0]),
        (9, 8, 0.25, [0, 1]),
        (14, 8, 0.25, [0, 6]),
        (15, 8, 0.25, [0, 3, 7]),
        (20, 8, 0.25, [0, 6, 12]),
        (24, 8, 0.5, [0, 4, 8, 12, 16]),
        (64, 10, 0.1, [0, 9, 18, 27, 36, 45, 54]),
    ],
)
def test_tiles_by_hand(length, tile, overlap, starts):
    assert tile_starts(length, tile, overlap) == starts


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.33, 0.5])
@pytest.mark.parametrize("tile", [8, 11, 32])
def test_weights_of_any_side(tile, overlap):
    for length in range(5, 100):
        starts, side = tile_starts(length, tile, overlap), min(tile, length)
        assert starts[0] == 0 and starts[-1] + side == length
        assert all(b - a <= tile - tile * overlap for a, b in zip(starts, starts[1:], strict=False))
        weights = blending_weights(starts, side, 2)
        assert weights.shape == (len(starts), 2 * length) and weights.min() >= 0
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(2 * length), rtol=0, atol=1e-6)
        for start, weight in zip(starts, weights, strict=True):
            assert weight[: 2 * start].eq(0).all() and weight[2 * (start + side) :].eq(0).all()


def test_ramp_is_linear_and_absent_at_the_border():
    first, second = blending_weights([0, 6], 8, 2)  # latents 6 and 7 are shared: pixels 12 .. 15
    assert second.tolist() == [0.0] * 12 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 12
    assert torch.equal(first, 1 - second)


# --- slices, and no tiles ---


def test_slices_equal_the_whole_batch():
    vae = random_vae()
    latents, pixels = torch.randn(5, 4, 8, 8), torch.rand(5, 3, 16, 16) * 2 - 1
    sizes = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(decode_in_parts(vae, latents, batch_size=2), vae.decode(latents), rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1, 5]
    torch.testing.assert_close(encode_in_parts(vae, pixels, batch_size=2), vae.encode(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 12, 13])
def test_without_tiles_it_is_the_model_itself(tile):
    vae = random_vae()
    latents, pixels = torch.randn(2, 4, 8, 12), torch.randn(2, 3, 16, 24)
    assert torch.equal(decode_in_parts(vae, latents, tile=tile), vae.decode(latents))
    assert torch.equal(encode_in_parts(vae, pixels, tile=tile), vae.encode(pixels))


# --- tiles, where they can be exact ---


@pytest.mark.parametrize(("height", "width", "tile"), [(24, 24, 8), (21, 40, 16), (10, 33, 16), (9, 9, 8)])
@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
def test_tiles_of_a_pointwise_autoencoder_equal_the_whole(height, width, tile, overlap):
    """Every tile is in its place and the weights of each pixel sum to 1, in the real decoder and encoder."""
    vae = pointwise_vae()
    latents, pixels = torch.randn(2, 4, height, width), torch.randn(2, 3, F * height, F * width)
    decoded = decode_in_parts(vae, latents, tile=tile, overlap=overlap)
    torch.testing.assert_close(decoded, vae.decode(latents), rtol=1e-5, atol=1e-5)
    encoded = encode_in_parts(vae, pixels, tile=tile, overlap=overlap)
    torch.testing.assert_close(encoded, vae.encode(pixels), rtol=1e-5, atol=1e-5)


def test_tiles_of_a_local_autoencoder_differ_only_in_the_overlap():
    """The decoder sees 9 latents and 6 pixels, 12 latents, to each side; the 16 shared ones hide what is cut off."""
    vae = local_vae()
    latents = torch.randn(1, 4, 64, 112)  # one row of tiles at 0 and 48, of 64 each
    whole = vae.decode(latents)
    difference = (decode_in_parts(vae, latents, tile=64, overlap=0.25) - whole).abs() / whole.std()
    shared = slice(F * 48, F * 64)
    assert difference[..., : shared.start].max() < 1e-4 and difference[..., shared.stop :].max() < 1e-4
    assert difference[..., shared].max() > 1e-2  # the zeros around a tile do reach into it


def test_one_tile_of_one_slice_is_decoded_at_a_time():
    vae = random_vae()
    shapes = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    pixels = decode_in_parts(vae, torch.randn(3, 4, 10, 40), batch_size=2, tile=16)
    assert pixels.shape == (3, 3, 20, 80)
    assert shapes == [(2, 4, 10, 16)] * 3 + [(1, 4, 10, 16)] * 3  # tiles at 0, 12 and 24, as high as the image


def test_bfloat16_stays_and_shows_no_ramp():
    vae = pointwise_vae().bfloat16()
    latents = torch.randn(1, 4, 24, 24, dtype=torch.bfloat16)
    tiled = decode_in_parts(vae, latents, tile=8)
    assert tiled.dtype == torch.bfloat16
    # Added up in bfloat16, the same value times two weights and summed would often be a neighbouring one.
    assert (tiled != vae.decode(latents)).float().mean() < 0.01


# --- tiles of a trained autoencoder ---


@pytest.fixture(scope="module")
def trained(vae_run: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(vae_run)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """112 px: latents of 56, two tiles of 32 per side that overlap by a quarter."""
    source = DataConfig(holdout=0, source="embedded", size=112, limit=16)
    return open_images(source, 3, seed=0, progress=False)[0].first(8)


def jumps(difference: Tensor, borders: list[int]) -> tuple[float, float]:
    """The mean change between neighbouring pixels, along both sides: across tile borders, and everywhere else."""
    across, inside = [], []
    for change in (difference.diff(dim=-1), difference.diff(dim=-2).transpose(-1, -2)):
        change = change.abs().mean(dim=(0, 1, 2))
        is_border = torch.zeros(len(change), dtype=torch.bool)
        is_border[[border - 1 for border in borders]] = True
        across.append(change[is_border].mean())
        inside.append(change[~is_border].mean())
    return torch.stack(across).mean().item(), torch.stack(inside).mean().item()


@pytest.mark.runs
def test_tiles_of_a_trained_autoencoder_are_near_the_whole(trained, pixels):
    latents = trained.sample(trained.encode(pixels))
    whole = trained.decode(latents)
    difference = decode_in_parts(trained, latents, tile=32) - whole
    # GroupNorm and attention see a tile instead of the image, which shifts its contrast: by 0.12 standard deviations
    # of the pixels here, where tiles of white background and tiles of the icon differ as much as possible.
    assert difference.abs().mean() < 0.2 * whole.std()

    moments = trained.encode(pixels)
    difference = encode_in_parts(trained, pixels, tile=32) - moments
    assert difference.abs().mean() < 0.15 * moments.std()  # measured: 0.09


@pytest.mark.runs
def test_larger_tiles_are_nearer(trained, pixels):
    latents = trained.sample(trained.encode(pixels))
    whole = trained.decode(latents)
    errors = [(decode_in_parts(trained, latents, tile=tile) - whole).abs().mean() for tile in (8, 16, 32, 48)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.runs
def test_tiles_show_no_seam(trained, pixels):
    latents = trained.sample(trained.encode(pixels))
    whole = trained.decode(latents)
    blended = decode_in_parts(trained, latents, tile=32)
    across, inside = jumps(blended - whole, [F * 24, F * 32])
    # A tile's outermost pixels are its worst, and the ramp starts just above 0: a little more than inside (measured:
    # 1.4 times), but about one of 255 grey values, 2 / 255.
    assert across < 2 * inside and across < 5 / 255
    halves = [latents[..., :28], latents[..., 28:]]
    quarters = [[trained.decode(half[..., rows, :]) for half in halves] for rows in (slice(28), slice(28, 56))]
    side_by_side = torch.cat([torch.cat(row, dim=-1) for row in quarters], dim=-2)
    cut, inside = jumps(side_by_side - whole, [F * 28])
    assert cut > 5 * inside and cut > 10 * across  # without the ramps there is one


@pytest.mark.runs
def test_one_colour_stays_one_colour(trained):
    """But for the zeros around a tile: their trace at its border is blended with the neighbour, not taken out."""
    latents = torch.tensor([0.5, -1.0, 1.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 56, 56)
    whole = trained.decode(latents)
    difference = (decode_in_parts(trained, latents, tile=32) - whole).abs()
    assert difference.mean() < 0.1 * whole.std()  # measured: 0.056; the whole varies by the zeros around it alone


# --- mistakes ---


@pytest.mark.runs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 7}, "tile is 7, must be at least 8 latent pixels"),
        ({"overlap": 0.05}, "overlap is 0.05, must be in 0.1 .. 0.5"),
        ({"tile": 16, "overlap": 0.6}, "overlap is 0.6, must be in 0.1 .. 0.5"),
        ({"overlap": float("nan")}, "overlap is nan"),
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    vae = random_vae()
    with pytest.raises(ValueError, match=message):
        decode_in_parts(vae, torch.zeros(1, 4, 8, 8), **arguments)
    with pytest.raises(ValueError, match=message):
        encode_in_parts(vae, torch.zeros(1, 3, 16, 16), **arguments)


def test_a_size_that_does_not_divide_is_named_whole():
    with pytest.raises(ValueError, match="image size 33x40 is not divisible by 2"):
        encode_in_parts(random_vae(), torch.zeros(1, 3, 33, 40), tile=8)

"""Perceptual terms against torchmetrics and hand computation, what every term must fulfil, and MS-SSIM as a metric."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.image import (
    structural_similarity_index_measure,
)
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import VGG16_Weights

from latentdiff.models.perceptual import (
    LPIPS,
    MSSSIM,
    PerceptualLoss,
    get_perceptual,
    ms_ssim,
    ms_ssim_scales,
)

NAMES = ["lpips", "ms_ssim"]
SIDE = 32


@pytest.fixture(scope="module")
def reference() -> _LPIPS:
    """torchmetrics' LPIPS: torchvision's VGG16 with random weights, and the fitted heads."""
    torch.manual_seed(0)
    return _LPIPS(net="vgg", pnet_rand=True)


@pytest.fixture(scope="module")
def vgg16_folder(reference: _LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `reference` under torchvision's names; the classifier is cut down to one tensor."""
    folder = tmp_path_factory.mktemp("vgg16")
    weights = {f"features.{key.split('.', 1)[1]}": value for key, value in reference.net.state_dict().items()}
    save_file(weights | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.safetensors")
    return folder


@pytest.fixture(scope="module")
def term(vgg16_folder: Path) -> Callable[[str], PerceptualLoss]:
    lpips = get_perceptual("lpips", str(vgg16_folder))
    return lambda name: lpips if name == "lpips" else get_perceptual(name)


def images(channels: int = 3, batch: int = 2, side: int = SIDE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images in [-1, 1] with some noise, and other ones near them: reconstruction, pixels."""
    noise = tiny.normal(2, batch, channels, side, side, seed=seed)
    coarse = F.interpolate(tiny.normal(batch, channels, 5, 5, seed=seed + 1), (side, side), mode="bilinear")
    pixels = (0.5 * coarse + 0.1 * noise[0]).clamp(-1, 1)
    return (pixels + 0.2 * noise[1]).clamp(-1, 1), pixels


# --- what every term fulfils ---


@pytest.mark.runs
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_zero_for_equal_images_else_positive(term, name, channels):
    reconstruction, pixels = images(channels)
    assert term(name)(pixels, pixels).abs().max() < 1e-6
    value = term(name)(reconstruction, pixels)
    assert value.shape == (2,) and (value > 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
def test_sees_a_shift_of_all_values(term, name):
    _, pixels = images()
    assert (term(name)(0.8 * pixels + 0.1, 0.8 * pixels) > 1e-5).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_reconstruction(term, name, channels):
    """Every channel of every image is pulled, downhill, and no gradient is left on the term's own weights."""
    reconstruction, pixels = images(channels)
    reconstruction.requires_grad_()
    before = term(name)(reconstruction, pixels)
    before.sum().backward()
    slope = reconstruction.grad
    assert slope.isfinite().all() and (slope.abs().sum(dim=(2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in term(name).parameters())
    step = 0.02 * slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert (term(name)((reconstruction - step).detach(), pixels) < before).all()


@pytest.mark.parametrize(
    "make",
    [lambda: images()[1], lambda: torch.zeros(2, 3, SIDE, SIDE), lambda: -torch.ones(2, 3, SIDE, SIDE)],
    ids=["noisy", "grey", "black"],
)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_at_equal_images_is_finite(term, name, make):
    reconstruction = make().requires_grad_()
    term(name)(reconstruction, make()).sum().backward()
    assert reconstruction.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_opposite_image_is_pulled_back(term, name):
    """The negative of an image, for which similarities are negative, and one far outside of [-1, 1]."""
    _, pixels = images()
    for far in (-pixels, 5 * pixels):
        reconstruction = far.clone().requires_grad_()
        term(name)(reconstruction, pixels).sum().backward()
        assert reconstruction.grad.isfinite().all()
        assert (reconstruction.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_image_alone_and_in_a_batch(term, name):
    reconstruction, pixels = images(batch=3)
    together = term(name)(reconstruction, pixels)
    alone = [term(name)(reconstruction[i : i + 1], pixels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together)


@pytest.mark.parametrize("name", NAMES)
def test_float32_under_autocast(term, name):
    reconstruction, pixels = images()
    expected = term(name)(reconstruction.bfloat16().float(), pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(name)(reconstruction.bfloat16(), pixels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "smallest"), [("lpips", 16), ("ms_ssim", 11)])
def test_smallest_side(term, name, smallest):
    reconstruction, pixels = images(side=smallest)
    assert term(name).smallest_side == smallest
    assert (term(name)(reconstruction, pixels) > 0).all()
    with pytest.raises(ValueError, match=f"{name}: images of {smallest}x{smallest - 1} px are too small, it needs"):
        term(name)(reconstruction[..., 1:], pixels[..., 1:])


@pytest.mark.parametrize("name", NAMES)
def test_too_many_channels(term, name):
    with pytest.raises(ValueError, match=f"{name}: images have 5 channels, must be 1 to 4"):
        term(name)(*images(channels=5))


def test_ms_ssim_slope_against_finite_differences():
    """In float64."""
    loss = MSSSIM()
    reconstruction, pixels = (x[:1, :1, :12, :12].double() for x in images())
    direction = tiny.normal(1, 1, 12, 12, seed=9).double()
    reconstruction.requires_grad_()
    with torch.no_grad():
        ends = [loss.distance(reconstruction + sign * 1e-6 * direction, pixels) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / 2e-6
    (slope,) = torch.autograd.grad(loss.distance(reconstruction, pixels).sum(), reconstruction)
    assert (slope * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5)


# --- LPIPS ---


def test_lpips_is_torchmetrics(term, reference):
    """Same VGG16, torchmetrics' copy of the fitted heads, images in [-1, 1] and not in [0, 1]."""
    reconstruction, pixels = images(batch=3)
    with torch.no_grad():
        expected = reference(reconstruction, pixels).flatten()
        other_range = reference(reconstruction, pixels, normalize=True).flatten()
    torch.testing.assert_close(term("lpips")(reconstruction, pixels), expected, rtol=1e-5, atol=0)
    assert ((other_range - expected).abs() / expected > 0.01).all()  # the test can tell the ranges apart


def test_lpips_gradient_is_torchmetrics(term, reference):
    slopes = []
    for measure in (term("lpips"), reference):
        reconstruction, pixels = images()
        reconstruction.requires_grad_()
        measure(reconstruction, pixels).sum().backward()
        slopes.append(reconstruction.grad)
    assert tiny.relative_error(*slopes) < 1e-4


def test_lpips_normalises_as_vgg16_was_trained(term):
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    unit = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    torch.testing.assert_close(term("lpips").normalized(2 * unit - 1), (unit - mean) / std)


def test_lpips_of_other_channels(term):
    """A grey image is one with three equal channels; a fourth channel counts as a grey image beside the colours."""
    reconstruction, pixels = images(channels=4)
    value = term("lpips")(reconstruction, pixels)
    colour = term("lpips")(reconstruction[:, :3], pixels[:, :3])
    grey = term("lpips")(reconstruction[:, 3:].repeat(1, 3, 1, 1), pixels[:, 3:].repeat(1, 3, 1, 1))
    torch.testing.assert_close(term("lpips")(reconstruction[:, 3:], pixels[:, 3:]), grey)
    torch.testing.assert_close(value, (colour + grey) / 2)


def test_lpips_is_frozen_and_uses_no_random_numbers(vgg16_folder):
    state = torch.get_rng_state()
    lpips = LPIPS.load(vgg16_folder / "vgg16.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    assert not lpips.training and not any(parameter.requires_grad for parameter in lpips.parameters())
    assert {tensor.device.type for tensor in [*lpips.parameters(), *lpips.buffers()]} == {"cpu"}
    reconstruction, pixels = images()
    assert not lpips(reconstruction, pixels).requires_grad


def test_lpips_gradient_where_no_feature_is_active(vgg16_folder):
    """Features of length 0, as in dark flat places: the slope of a root at 0 would make the whole gradient NaN."""
    lpips = LPIPS.load(vgg16_folder)
    for layer in lpips.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(-100.0)
    reconstruction, pixels = images()
    reconstruction.requires_grad_()
    value = lpips(reconstruction, pixels)
    value.sum().backward()
    assert value.tolist() == [0, 0] and reconstruction.grad.isfinite().all()


def test_lpips_from_the_file_of_the_hub(vgg16_folder, tmp_path):
    """timm's file is called model.safetensors, and its classifier has other names; half precision is read too."""
    weights = load_file(vgg16_folder / "vgg16.safetensors")
    convs = {key: value.half() for key, value in weights.items() if key.startswith("features.")}
    save_file(
        convs | {"pre_logits.fc1.bias": torch.zeros(2), "head.fc.bias": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    lpips = get_perceptual("lpips", str(tmp_path))
    assert {parameter.dtype for parameter in lpips.parameters()} == {torch.float32}
    torch.testing.assert_close(lpips.features[28].bias, weights["features.28.bias"], rtol=1e-3, atol=1e-6)


def test_lpips_without_its_weights(vgg16_folder, tmp_path):
    """Each error is one line that says what was tried and what to do."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "vgg16.pth").write_bytes(b"PK")
    (tmp_path / "broken.safetensors").write_bytes(b"PK")
    weights = load_file(vgg16_folder / "vgg16.safetensors")
    del weights["features.0.weight"]
    weights["features.2.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "other.safetensors")
    advice = r"for how to make one see .*lpips/README.md"
    cases = {
        str(tmp_path / "empty"): rf"empty has neither vgg16.safetensors nor model.safetensors; {advice}",
        str(tmp_path / "vgg16.pth"): rf"vgg16.pth is not a safetensors file, the only kind that is read; {advice}",
        str(tmp_path / "missing.safetensors"): "missing.safetensors does not exist",
        str(tmp_path / "broken.safetensors"): "broken.safetensors is truncated or not a safetensors file",
        str(tmp_path / "other.safetensors"): r"missing features.0.weight; features.2.bias is \[3\]",
        "nobody/no-such-vgg16": rf"'nobody/no-such-vgg16' are neither a file, nor a folder, nor a model .*{advice}",
        "not a hub id": "'not a hub id' are neither a file, nor a folder, nor a model",
    }
    for given, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            get_perceptual("lpips", given)
        assert "\n" not in str(error.value)


# --- multi-scale SSIM ---


def ms_ssim_by_torchmetrics(
    reconstruction: Tensor, pixels: Tensor, exponents: Sequence[float], *, shifted: bool
) -> Tensor:
    """The product of torchmetrics' single-scale terms, without the border, where it pads the images.

    Its own multi-scale function keeps that border.
    """
    similarity = torch.ones(len(pixels))
    for i, exponent in enumerate(exponents):
        common = {"data_range": 2.0, "reduction": "none"}
        _, local = structural_similarity_index_measure(reconstruction, pixels, return_full_image=True, **common)
        value = local[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        if i < len(exponents) - 1:
            _, structure = structural_similarity_index_measure(
                reconstruction, pixels, return_contrast_sensitivity=True, **common
            )
            value = structure.reshape(len(pixels), -1).mean(dim=1)
        similarity = similarity * ((1 + value) / 2 if shifted else value.relu()) ** (exponent / sum(exponents))
        reconstruction, pixels = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(pixels, 2)
    return similarity


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("side", "exponents"),
    [(16, [1.0]), (64, [0.0448, 0.2856, 0.3001]), (176, [0.0448, 0.2856, 0.3001, 0.2363, 0.1333])],
)
def test_ms_ssim_is_torchmetrics(side, exponents, channels):
    """Of near, opposite and equal images: as a loss, and as a metric."""
    near, pixels = images(channels, side=side)
    for other in (near, -pixels, pixels):
        expected = ms_ssim_by_torchmetrics(other, pixels, exponents, shifted=True)
        torch.testing.assert_close(MSSSIM()(other, pixels), 1 - expected, rtol=1e-4, atol=1e-6)
        expected = ms_ssim_by_torchmetrics(other, pixels, exponents, shifted=False)
        torch.testing.assert_close(ms_ssim(other, pixels, shifted=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "scales"), [(10, 0), (11, 1), (21, 1), (22, 2), (43, 2), (44, 3), (175, 4), (176, 5), (512, 5)]
)
def test_number_of_scales(side, scales):
    assert ms_ssim_scales(side) == scales


def test_ms_ssim_of_flat_images_by_hand():
    """Without contrast only the luminance term is left: 2 ab + C1 over a^2 + b^2 + C1, C1 = (0.01 * 2)^2."""
    value = MSSSIM()(torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25))
    luminance = (2 * 0.5 * 0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    assert value.item() == pytest.approx(1 - (1 + luminance) / 2, abs=1e-5)


# --- choosing one ---


def test_get_perceptual():
    assert type(get_perceptual("ms_ssim")) is MSSSIM
    with pytest.raises(ValueError, match="'vgg' is unknown; must be one of lpips, ms_ssim"):
        get_perceptual("vgg")
    with pytest.raises(ValueError, match="ms_ssim has no weights, but 'folder' is given; only lpips has weights"):
        get_perceptual("ms_ssim", "folder")

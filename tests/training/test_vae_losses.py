"""The terms of stage 1's loss against hand computation, closed forms and torch's own losses."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentdiff.training.vae_losses import (
    CHARBONNIER_EPSILON,
    HUBER_DELTA,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    gaussian_nll,
    generator_loss,
    last_layer_gradients,
    reconstruction_error,
)

NAMES = ["mse", "l1", "huber", "charbonnier"]
KINDS = ["hinge", "non_saturating"]

# --- reconstruction ---


@pytest.mark.parametrize(
    ("name", "per_value"),
    [
        ("mse", lambda d: d**2),
        ("l1", abs),
        ("huber", lambda d: d**2 / 2 if abs(d) < HUBER_DELTA else HUBER_DELTA * (abs(d) - HUBER_DELTA / 2)),
        ("charbonnier", lambda d: math.hypot(d, CHARBONNIER_EPSILON) - CHARBONNIER_EPSILON),
    ],
)
def test_reconstruction_error_by_hand(name, per_value):
    """The first image's errors are on both sides of Huber's knee; the mean is over an image, not over the batch."""
    errors = [[0.0, 0.05, -0.5, 1.5], [0.001, -0.002, 0.0, 0.09]]
    pixels = tiny.normal(2, 1, 2, 2, seed=1)
    reconstruction = pixels + torch.tensor(errors).view(2, 1, 2, 2)
    expected = torch.tensor([sum(map(per_value, row)) / 4 for row in errors])
    torch.testing.assert_close(reconstruction_error(name, reconstruction, pixels), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_error_of_equal_images(name):
    """0, with a finite gradient: no root of 0."""
    pixels = tiny.normal(2, 3, 4, 4)
    reconstruction = pixels.clone().requires_grad_()
    error = reconstruction_error(name, reconstruction, pixels)
    error.sum().backward()
    assert error.tolist() == [0, 0]
    assert reconstruction.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_error_is_float32_under_autocast(name):
    pixels, reconstruction = tiny.normal(2, 3, 4, 4), tiny.normal(2, 3, 4, 4, seed=1)
    expected = reconstruction_error(name, reconstruction.bfloat16().float(), pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = reconstruction_error(name, reconstruction.bfloat16(), pixels)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, expected, rtol=1e-6, atol=0)


def test_unknown_reconstruction_error():
    with pytest.raises(ValueError, match="'l2' is unknown; must be mse, l1, huber or charbonnier"):
        reconstruction_error("l2", torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_channels_are_not_broadcast():
    with pytest.raises(AssertionError, match=r"\[1, 1, 2, 2\] is compared to \[1, 3, 2, 2\]"):
        reconstruction_error("mse", torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2))


# --- learned output variance ---


def test_gaussian_nll_is_that_of_a_gaussian():
    pixels, reconstruction = tiny.normal(3, 3, 4, 4), tiny.normal(3, 3, 4, 4, seed=1)
    log_variance = torch.tensor(-1.3)
    gaussian = torch.distributions.Normal(reconstruction, torch.exp(0.5 * log_variance))
    expected = -2 * gaussian.log_prob(pixels).flatten(1).mean(dim=1) - math.log(2 * math.pi)
    error = reconstruction_error("mse", reconstruction, pixels)
    torch.testing.assert_close(gaussian_nll(error, log_variance), expected)


def test_best_log_variance_is_the_log_of_the_mean_error():
    error = torch.tensor([0.02, 0.3, 0.1])
    log_variance = error.mean().log().requires_grad_()
    loss = gaussian_nll(error, log_variance).mean()
    (slope,) = torch.autograd.grad(loss, log_variance)
    assert abs(slope) < 1e-6
    assert loss.item() == pytest.approx(1 + math.log(0.14), abs=1e-5)
    for other in (log_variance - 0.5, log_variance + 0.5):
        assert gaussian_nll(error, other).mean() > loss


# --- adversarial ---


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2 + 0.5) / 4)
    assert generator_loss("hinge", fake).item() == pytest.approx(2.5 / 4)


def test_non_saturating_is_cross_entropy():
    real, fake = 3 * tiny.normal(2, 1, 4, 4), 3 * tiny.normal(2, 1, 4, 4, seed=1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        discriminator_loss("non_saturating", real, fake), entropy(real, ones) + entropy(fake, zeros)
    )
    torch.testing.assert_close(generator_loss("non_saturating", fake), entropy(fake, ones))


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_losses_are_means(kind):
    """More logits of the same values change nothing: larger images or batches don't weigh more."""
    real, fake = tiny.normal(1, 1, 4, 4), tiny.normal(1, 1, 4, 4, seed=1)
    real_again, fake_again = real.repeat(3, 1, 2, 2), fake.repeat(3, 1, 2, 2)
    torch.testing.assert_close(discriminator_loss(kind, real_again, fake_again), discriminator_loss(kind, real, fake))
    torch.testing.assert_close(generator_loss(kind, fake_again), generator_loss(kind, fake))


@pytest.mark.parametrize("kind", KINDS)
def test_directions(kind):
    """The discriminator raises real logits and lowers fake ones, the autoencoder raises fake ones."""
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    generator_loss(kind, fake).backward()
    assert (fake.grad < 0).all()


def test_non_saturating_generator_learns_where_the_discriminator_is_sure():
    """For a fake that the discriminator is sure of the loss has slope -1, where log(1 - D) would have none."""
    logit = torch.tensor([-200.0], requires_grad=True)
    loss = generator_loss("non_saturating", logit)
    loss.backward()
    assert loss.item() == pytest.approx(200) and logit.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_losses_are_float32_under_autocast(kind):
    real, fake = tiny.normal(64).bfloat16(), tiny.normal(64, seed=1).bfloat16()
    expected = discriminator_loss(kind, real.float(), fake.float()), generator_loss(kind, fake.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = discriminator_loss(kind, real, fake), generator_loss(kind, fake)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_unknown_adversarial_loss():
    for call in (lambda: discriminator_loss("wgan", *torch.zeros(2, 1)), lambda: generator_loss("wgan", torch.ones(1))):
        with pytest.raises(ValueError, match="'wgan' is unknown; must be hinge or non_saturating"):
            call()


def test_accuracy_by_hand():
    """Real: 2 of 3 right, fake: 1 of 3; a logit of 0 is on no side."""
    accuracy = discriminator_accuracy(torch.tensor([1.0, 0.1, -2.0]), torch.tensor([0.0, -0.1, 3.0]))
    assert accuracy.item() == pytest.approx(3 / 6) and accuracy.shape == ()


# --- the weight between reconstruction and adversarial loss ---


def two_losses(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (3, 4) and (0, 0.5) for the weight: norms 5 and 0.5."""
    return (weight * torch.tensor([3.0, 4.0])).sum(), 0.5 * weight[1]


def balance(reconstruction, adversarial, weight, **options):
    return adaptive_weight(*last_layer_gradients([reconstruction, adversarial], weight), **options)


def test_adaptive_weight_by_hand():
    weight = torch.ones(2, requires_grad=True)
    factor = balance(*two_losses(weight), weight)
    assert factor.item() == pytest.approx(5 / (0.5 + 1e-4)) and factor.shape == ()
    assert not factor.requires_grad and weight.grad is None
    assert balance(*two_losses(weight), weight, maximum=3.0).item() == 3


def test_adaptive_weight_of_a_silent_discriminator_is_the_maximum():
    weight = torch.ones(2, requires_grad=True)
    reconstruction, _ = two_losses(weight)
    assert balance(reconstruction, 0.0 * weight.sum(), weight).item() == 1e4


def test_equally_scaled_losses_have_the_same_weight():
    weight = torch.ones(2, requires_grad=True)
    reconstruction, adversarial = two_losses(weight)
    scaled = balance(2.0**16 * reconstruction, 2.0**16 * adversarial, weight)
    assert scaled.item() == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_adaptive_weight_balances_the_gradients_of_a_vae(autocast):
    """Weighted by it, both losses pull equally hard at the decoder's last layer; the graph stays for backward."""
    vae = tiny.tiny_vae()
    discriminator = tiny.perturb(PatchDiscriminator.from_config(DISCRIMINATOR, 0))
    pixels = tiny.normal(2, 3, 16, 16).clamp(-1, 1)
    last = vae.decoder.conv_out.weight
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        reconstruction, _ = vae(pixels)
        error = reconstruction_error("l1", reconstruction, pixels).mean()
        adversarial = generator_loss("hinge", discriminator(reconstruction))
        factor = balance(error, adversarial, last)
    assert factor.dtype == torch.float32
    assert all(parameter.grad is None for model in (vae, discriminator) for parameter in model.parameters())
    (expected,) = torch.autograd.grad(error, last, retain_graph=True)
    (factor * adversarial).backward()
    assert last.grad.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


# --- the two steps of adversarial training ---

DISCRIMINATOR = DiscriminatorConfig(width=8, layers=1, norm_num_groups=4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_moves_its_own_network(kind):
    """The discriminator's loss has no gradient in the autoencoder (reconstructions are detached), the other has."""
    vae, discriminator = tiny.tiny_vae(), PatchDiscriminator.from_config(DISCRIMINATOR, 0)
    pixels = tiny.normal(2, 3, 16, 16).clamp(-1, 1)
    reconstruction, _ = vae(pixels)
    discriminator_loss(kind, discriminator(pixels), discriminator(reconstruction.detach())).backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters() if parameter.ndim == 4)

    before = [parameter.grad.clone() for parameter in discriminator.parameters()]
    discriminator.requires_grad_(False)
    generator_loss(kind, discriminator(reconstruction)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.decoder.parameters())
    assert all(map(torch.equal, before, [parameter.grad for parameter in discriminator.parameters()]))


def test_discriminator_learns_to_distinguish_sharp_from_blurred():
    discriminator = PatchDiscriminator.from_config(DISCRIMINATOR, 0)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(40):
        real = tiny.normal(8, 3, 16, 16, seed=step)
        fake = F.avg_pool2d(real, 3, stride=1, padding=1)
        loss = discriminator_loss("hinge", discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real = tiny.normal(8, 3, 16, 16, seed=1000)
    fake = F.avg_pool2d(real, 3, stride=1, padding=1)
    assert discriminator_accuracy(discriminator(real), discriminator(fake)) > 0.95

"""The terms of stage 1's loss as pure functions: reconstruction, learned log-variance, adversarial, adaptive weight.

Each works in float32 for inputs of any type, also under autocast.
Shapes: B batch, C channels, H W pixels, h' w' the discriminator's patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.config import AdversarialKind, ReconstructionName

# 13 of 255 grey levels (pixels are in [-1, 1]): smaller errors are texture and noise, whose gradient should fade as
# with a square; larger ones are misplaced edges, which should not outweigh everything else.
HUBER_DELTA = 0.1
# An eighth of a grey level: an absolute error wherever it is visible, smooth at 0 (the value of Lai et al. 2017).
CHARBONNIER_EPSILON = 1e-3
# Esser et al. 2021 add it to the norm of the adversarial gradient, which is 0 for a constant discriminator.
ADAPTIVE_WEIGHT_DELTA = 1e-4
LARGEST_ADAPTIVE_WEIGHT = 1e4


def reconstruction_error(name: ReconstructionName, reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """How far each reconstruction is from its image, [B]: the mean over C, H and W; 0 for equal images.

    | name        | per value, d = reconstruction - pixels                                                             |
    |-------------|----------------------------------------------------------------------------------------------------|
    | mse         | d^2                                                                                                |
    | l1          | abs(d)                                                                                             |
    | huber       | d^2 / 2 below HUBER_DELTA, a line of that slope above (Huber 1964)                                 |
    | charbonnier | sqrt(d^2 + eps^2) - eps, eps = CHARBONNIER_EPSILON (Charbonnier et al. 1994), shifted to be 0 at 0 |

    reconstruction, pixels: [B, C, H, W] in [-1, 1]. Raises ValueError for an unknown name.
    """
    assert reconstruction.shape == pixels.shape, f"{list(reconstruction.shape)} is compared to {list(pixels.shape)}"
    difference = reconstruction.float() - pixels.float()
    if name == "mse":
        error = difference.square()
    elif name == "l1":
        error = difference.abs()
    elif name == "huber":
        error = F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=HUBER_DELTA)
    elif name == "charbonnier":
        error = (difference.square() + CHARBONNIER_EPSILON**2).sqrt() - CHARBONNIER_EPSILON
    else:
        raise ValueError(f"reconstruction error {name!r} is unknown; must be mse, l1, huber or charbonnier")
    return error.flatten(1).mean(dim=1)


def gaussian_nll(error: Tensor, log_variance: Tensor) -> Tensor:
    """error / exp(log_variance) + log_variance, [B]: the decoder's likelihood with one learned output variance.

    For the mean squared error this is twice the negative log-likelihood of a Gaussian per value, less log(2 pi)
    (Dai & Wipf 2019; the `logvar` in the code of Rombach et al. 2022). It is least where log_variance is the log of
    the mean error. error: [B]; log_variance: a scalar parameter.
    """
    log_variance = log_variance.float()
    return error.float() * torch.exp(-log_variance) + log_variance


def discriminator_loss(kind: AdversarialKind, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises, a scalar: means over all logits, which should be positive for real images.

    hinge: E max(0, 1 - D(x)) + E max(0, 1 + D(y)) (Lim & Ye 2017);
    non_saturating: -E log sigmoid(D(x)) - E log(1 - sigmoid(D(y))), as softplus (Goodfellow et al. 2014, eq. 1).
    The logits, [B, 1, h', w'], are those of images and of reconstructions that are detached from the autoencoder.
    """
    real_logits, fake_logits = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    if kind == "non_saturating":
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    raise _unknown_kind(kind)


def generator_loss(kind: AdversarialKind, fake_logits: Tensor) -> Tensor:
    """What the autoencoder minimises, a scalar mean over the logits [B, 1, h', w'] of its reconstructions.

    hinge: -E D(y) (Lim & Ye 2017); non_saturating: -E log sigmoid(D(y)) (Goodfellow et al. 2014, section 3).
    """
    fake_logits = fake_logits.float()
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "non_saturating":
        return F.softplus(-fake_logits).mean()
    raise _unknown_kind(kind)


def last_layer_gradients(losses: Sequence[Tensor], last_layer_weight: Tensor) -> list[Tensor]:
    """The float32 gradient of each scalar loss at the decoder's last layer; none is accumulated, the graphs stay."""
    return [torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0].float() for loss in losses]


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float = LARGEST_ADAPTIVE_WEIGHT
) -> Tensor:
    """The factor that makes the adversarial gradient as large as the reconstruction's at the decoder's last layer.

    |grad L_rec| / (|grad L_adv| + 1e-4), at most `maximum`, a scalar (Esser et al. 2021, eq. 7), from the two gradients
    of `last_layer_gradients`, such as their means over a batch.
    """
    reconstruction, adversarial = map(torch.linalg.vector_norm, (reconstruction_gradient, adversarial_gradient))
    return (reconstruction / (adversarial + ADAPTIVE_WEIGHT_DELTA)).clamp(max=maximum)


def discriminator_accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The fraction of logits on the right side of 0, a scalar in [0, 1]: real ones above, fake ones below."""
    return torch.cat([(real_logits > 0).flatten(), (fake_logits < 0).flatten()]).float().mean()


def _unknown_kind(kind: str) -> ValueError:
    return ValueError(f"adversarial loss {kind!r} is unknown; must be hinge or non_saturating")

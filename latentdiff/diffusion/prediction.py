"""What the network predicts (epsilon, v or the clean latents), and how to compute the clean latents from it.

Training and sampling both use this table; no other code depends on the parameterisation.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Prediction(NamedTuple):
    """A parameterisation at a noise level alpha, sigma, where x = alpha * x0 + sigma * epsilon.

    target(alpha, sigma, x0, epsilon): what a perfect network returns.
    x0(alpha, sigma, x, output): the clean latents that an output implies, in the dtype of x.
    weight(abar): the squared error of epsilon as a multiple of that of the output, [T] float64.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x0: Callable[[float, float, Tensor, Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]


PREDICTIONS: dict[PredictionType, Prediction] = {
    "epsilon": Prediction(
        target=lambda alpha, sigma, x0, epsilon: epsilon,
        x0=lambda alpha, sigma, x, output: torch.add(x, output, alpha=-sigma) / alpha,
        weight=torch.ones_like,
    ),
    "v_prediction": Prediction(  # Salimans & Ho 2022, section 4
        target=lambda alpha, sigma, x0, epsilon: alpha * epsilon - sigma * x0,
        x0=lambda alpha, sigma, x, output: torch.add(alpha * x, output, alpha=-sigma),
        weight=lambda abar: abar,
    ),
    "sample": Prediction(
        target=lambda alpha, sigma, x0, epsilon: x0,
        x0=lambda alpha, sigma, x, output: output.to(x.dtype),
        weight=lambda abar: abar / (1 - abar),
    ),
}

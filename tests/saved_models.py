"""Weights of two models compared bit for bit."""

import torch
from torch import nn


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours)


def without(tensors: dict, part: str) -> dict:
    return {key: value for key, value in tensors.items() if part not in key}

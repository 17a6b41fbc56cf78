"""Distributed tensors."""

import torch
from states import equal
from torch import nn

from latentdiff.distributed import fill, gather_whole


def test_gathering_and_filling_of_whole_tensors():
    tensors = {"a": nn.Parameter(torch.arange(6.0).view(2, 3)), "b": torch.tensor(7)}
    held = gather_whole(tensors, keep=True)
    assert equal(held, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}) and not held["a"].requires_grad
    assert gather_whole(tensors, keep=False) == {}
    place = tensors["a"].data_ptr()
    fill(tensors["a"], torch.full((2, 3), 2.0, dtype=torch.float64))
    assert tensors["a"].tolist() == [[2.0] * 3] * 2 and tensors["a"].data_ptr() == place and tensors["a"].requires_grad

"""Evaluation mode for a block."""

import pytest
from tiny import (
    tiny_unet,
)

from latentdiff.models.eval_mode import eval_mode


def test_eval_mode_restores_every_mode() -> None:
    unet = tiny_unet().train()
    unet.mid_block.eval()
    before = {name: module.training for name, module in unet.named_modules()}
    with pytest.raises(KeyError), eval_mode(unet):
        assert not any(module.training for module in unet.modules())
        raise KeyError
    assert {name: module.training for name, module in unet.named_modules()} == before
    assert unet.training and not unet.mid_block.resnets[0].training

"""Muon: parity with torch.optim.Muon, which parameters it updates, resumes, what it does not work with."""

import shutil

import pytest
import torch
from scripts import assert_same_weights, demo_config, run_unet
from states import equal, moments, new_state, output, same_state, train, weights
from tiny import normal, tiny_text_encoder, tiny_unet
from torch import nn
from torch.optim import AdamW
from torch.optim import Muon as TorchMuon

from latentdiff.config import OptimizerConfig
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.checkpoint import checkpoint_folder, resume, save_checkpoint
from latentdiff.training.muon import Muon, hidden_matrices, orthogonalised
from latentdiff.training.optimizer import build_optimizer, set_learning_rate

MUON = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1)


def model_with_a_kernel() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(24, 5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_updates_equal_those_of_torch(layout: torch.memory_format):
    """A kernel as the matrix [out, in * k * k]; biases and norms by AdamW."""
    model, reference = model_with_a_kernel().to(memory_format=layout), model_with_a_kernel()
    optimizer = build_optimizer(model, MUON)
    assert isinstance(optimizer, Muon)
    kernel = nn.Parameter(reference[0].weight.detach().flatten(1).clone())
    matrices = [kernel, reference[3].weight]
    rest = [p for p in reference.parameters() if p.ndim == 1]
    muon = TorchMuon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(rest, lr=1e-2, weight_decay=0.0, fused=True)
    set_learning_rate(optimizer, 1e-2)
    for step in range(5):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = normal(*parameter.shape, seed=10 * step + number)
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        kernel.grad = model[0].weight.grad.flatten(1).clone()
        for each in (optimizer, muon, adamw):
            each.step()
    assert torch.equal(model[0].weight.flatten(1), kernel)
    for name in ("0.bias", "1.weight", "1.bias", "3.weight", "3.bias"):
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name)), name


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]):
    matrix = normal(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalised(matrix[None])[0].float()
    values = torch.linalg.svdvals(result)
    assert 0.3 < values.min() and values.max() < 1.6
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_hidden_layers_are_without_embeddings_input_and_output():
    model = TextConditionedUNet(tiny_unet(), tiny_text_encoder())
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for p in hidden_matrices(model)}
    rest = {name for name, p in model.named_parameters() if p.ndim >= 2} - chosen
    assert {name.rpartition("model.")[2] for name in rest} == {
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
    }
    assert all(model.get_parameter(name).ndim >= 2 for name in chosen) and len(chosen) > 50
    model.unet.requires_grad_(False)
    assert not any(names[id(p)].startswith("unet.") for p in hidden_matrices(model))


def test_skipped_step_changes_nothing(accelerator):
    state = new_state(accelerator, optimizer_config=MUON)
    train(state, 2)
    before, moments_before = weights(state.model), moments(state)
    train(state, 3, spoilt=(2,))
    assert equal(weights(state.model), before) and equal(moments(state), moments_before)
    train(state, 4)
    assert not equal(weights(state.model), before)


def test_resumed_training_equals_uninterrupted_training(tmp_path, accelerator):
    straight, saved = (new_state(accelerator, optimizer_config=MUON) for _ in range(2))
    train(straight, 7)
    train(saved, 4)
    save_checkpoint(tmp_path, saved, output(), accelerator)
    resumed = new_state(accelerator, seed=1, optimizer_config=MUON)
    assert resume(tmp_path, resumed, "latest", accelerator)
    train(resumed, 7)
    assert same_state(resumed, straight)
    assert {name for name in moments(straight) if "momentum" in name} == {
        "0.weight:momentum_buffer",
        "3.weight:momentum_buffer",
    }


@pytest.mark.parametrize("first", ["adamw", "muon"])
def test_checkpoint_of_another_optimizer_is_refused(tmp_path, accelerator, first: str):
    kinds = {"muon": MUON, "adamw": OptimizerConfig(lr=1e-2)}
    saved = new_state(accelerator, optimizer_config=kinds.pop(first))
    train(saved, 1)
    save_checkpoint(tmp_path, saved, output(), accelerator)
    other = new_state(accelerator, optimizer_config=next(iter(kinds.values())))
    before = weights(other.model)
    with pytest.raises(ValueError, match="^the checkpoint was written with another optimizer.kind"):
        resume(tmp_path, other, "latest", accelerator)
    assert equal(weights(other.model), before)


def test_sharding_and_fp16_are_refused(tmp_path, monkeypatch):
    config = demo_config(tmp_path, "optimizer.kind=muon")
    assert start_accelerator(config)[0].mixed_precision == "no"
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    with pytest.raises(
        ValueError, match="^optimizer.kind muon works neither under FSDP2 nor with train.precision fp16"
    ):
        start_accelerator(config)


@pytest.mark.runs
def test_run_resumes_bit_for_bit(tmp_path, vae_run):
    """The training script, from a checkpoint in the middle."""
    straight = run_unet(tmp_path / "straight", vae_run, "optimizer.kind=muon")
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(checkpoint_folder(resumed, 6))
    shutil.rmtree(resumed / "unet")
    run_unet(resumed, vae_run, "optimizer.kind=muon")
    for name in ("model", "ema", "optimizer"):
        assert_same_weights(straight, resumed, f"checkpoints/step_00000006/{name}.safetensors")
    assert_same_weights(straight, resumed, "unet/diffusion_pytorch_model.safetensors")

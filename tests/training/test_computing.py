"""Weights in bf16 with float32 masters: against a training written out by hand, and in whole runs."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from scripts import ROOT, TINY_UNET, arguments, assert_same_weights, finish, launch, metrics, run_unet, run_vae, start
from tiny import normal, relative_error, tiny_text_encoder, tiny_unet, tiny_vae
from torch import Tensor, nn

from latentdiff.config import Compile, OptimizerConfig, TrainConfig, UNetTrainingConfig, load_config
from latentdiff.models.compiling import compile_network
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.computing import BF16Weights, Compiled, memory_format
from latentdiff.training.ema import EMA
from latentdiff.training.optimizer import apply_gradients, build_optimizer, set_learning_rate

FSDP2 = str(ROOT / "configs" / "accelerate" / "fsdp2-cpu.yaml")
BF16 = ["train.precision=auto", "train.weights=bf16"]


@pytest.mark.parametrize(
    ("given", "device", "last"),
    [(None, "cuda", True), (None, "cpu", False), (None, "mps", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_the_layout_is_that_of_the_device_unless_given(given: bool | None, device: str, last: bool) -> None:
    expected = torch.channels_last if last else torch.contiguous_format
    train = TrainConfig(steps=1, batch_size=1, channels_last=given)
    assert memory_format(train, torch.device(device)) == expected


def network(*, checkpointing: bool = False) -> TextConditionedUNet:
    """UNet and text encoder, whose masters differ from any bf16 number."""
    unet = tiny_unet()
    unet.enable_gradient_checkpointing(checkpointing)
    return TextConditionedUNet(unet, tiny_text_encoder()).train()


def micro_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 4, 8, 8, seed=seed), torch.tensor([1, 700]), torch.tensor([[49406, 320 + seed, 49407]] * 2)


def loss(output: Tensor, seed: int) -> Tensor:
    return (output.float() - normal(2, 4, 8, 8, seed=100 + seed)).square().mean()


def by_hand(model: nn.Module) -> nn.Module:
    """A copy in bf16, but for the weights of norms and embeddings; these round what they find."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        elif not isinstance(module, nn.GroupNorm | nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    return model


def test_equals_a_training_with_master_weights_by_hand() -> None:
    """Four steps of AdamW on two micro-batches with clipping, to the bit: weights, and an EMA of the masters."""
    ours = network()
    theirs = by_hand(ours)
    masters = {name: p.detach().clone() for name, p in ours.named_parameters()}
    average = {name: p.clone() for name, p in masters.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in masters.items()}

    model, ema = BF16Weights(ours), EMA(ours)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    for step in range(1, 5):
        for seed in (2 * step, 2 * step + 1):
            (loss(model(*micro_batch(seed)), seed) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(ours, 0.9)

        gradients = {name: torch.zeros_like(p) for name, p in masters.items()}
        for seed in (2 * step, 2 * step + 1):
            noisy, timesteps, ids = micro_batch(seed)
            (loss(theirs(noisy.bfloat16(), timesteps, ids), seed) / 2).backward()
            for name, parameter in theirs.named_parameters():
                gradients[name] += parameter.grad.float()
                parameter.grad = None
        expected = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        assert torch.equal(norm, expected) and norm > 0.5
        for name, master in masters.items():
            gradient, (first, second) = gradients[name] * (0.5 / (norm + 1e-6)), moments[name]
            master *= 1 - 1e-3 * 0.1
            first.lerp_(gradient, 1 - 0.9)
            second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
            root = (second.sqrt() / math.sqrt(1 - 0.999**step)).add_(1e-8)
            master.addcdiv_(first, root, value=-1e-3 / (1 - 0.9**step))
            average[name].lerp_(master, 1 - 0.9)
            theirs.get_parameter(name).data.copy_(master)

    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, masters[name]), name
        assert torch.equal(ema.average[name], average[name]), name
    moved = relative_error(ours.unet.conv_in.weight, network().unet.conv_in.weight)
    assert 1e-3 < moved < 0.1


def test_masters_are_the_only_parameters_and_have_float32_gradients() -> None:
    model = BF16Weights(net := network())
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    assert {f"network.{key}" for key in net.state_dict()} == model.state_dict().keys()
    output = model(*micro_batch(0))
    loss(output, 0).backward()
    assert output.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in net.parameters())


def test_is_near_float32_weights_under_autocast() -> None:
    """Output and gradients, as near to float32 as autocast is: both round to 8 bits in other places."""
    errors = {}
    batch, exact = micro_batch(3), network()
    loss(exact(*batch), 3).backward()
    for kind in ("autocast", "bf16"):
        net = network()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            output = (net if kind == "autocast" else BF16Weights(net))(*batch)
        loss(output, 3).backward()
        pairs = zip(net.parameters(), exact.parameters(), strict=True)
        difference = sum((p.grad - q.grad).square().sum() for p, q in pairs)
        errors[kind] = float(difference / sum(p.grad.square().sum() for p in exact.parameters())) ** 0.5
    assert errors["bf16"] < 1.2 * errors["autocast"] < 0.03, errors


def test_weights_are_rounded_once_per_step() -> None:
    """Not in the second micro-batch: what a step computes with does not change under its gradients."""
    net = network()
    model = BF16Weights(net)
    loss(model(*micro_batch(1)), 1).backward()
    first = model(*micro_batch(2)).detach()
    with torch.no_grad():
        net.unet.conv_out.bias += 1
    assert torch.equal(model(*micro_batch(2)), first)
    model.zero_grad(set_to_none=True)
    assert torch.allclose(model(*micro_batch(2)), first + 1, atol=0.05)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_changed_masters_are_rounded_again(kind: str, accelerator: Accelerator) -> None:
    """After a step of each optimiser, and with the averaged weights in the model's place and back."""
    net = network()
    model, ema = BF16Weights(net), EMA(net)
    optimizer = accelerator.prepare(build_optimizer(net, OptimizerConfig(kind=kind, lr=1e-2)))
    set_learning_rate(optimizer, 1e-2)

    def now() -> Tensor:
        return model(*micro_batch(1)).detach()

    def fresh() -> Tensor:
        return BF16Weights(copy.deepcopy(net))(*micro_batch(1)).detach()

    before = now()
    loss(model(*micro_batch(1)), 1).backward()
    apply_gradients(accelerator, optimizer, skip=torch.zeros(()))
    assert torch.equal(after := now(), fresh()) and relative_error(after, before) > 0.01
    with ema.applied(net):
        assert torch.equal(now(), before)
    assert torch.equal(now(), after)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    """They are computed again in the backward pass, with the rounded weights."""
    gradients = []
    for checkpointing in (False, True):
        net = network(checkpointing=checkpointing)
        loss(BF16Weights(net)(*micro_batch(1)), 1).backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_is_one_graph_for_the_compiler() -> None:
    """Over two steps, traced as torch.compile does, but run by PyTorch's own kernels: to the bit.

    The gradients of blocks are summed in another order: all that has changed is as near to a training in float32.
    """
    start = [p.detach().clone() for p in network().parameters()]
    ends = {}
    for how in ("float32", "off", "blocks", "step"):
        net = network(checkpointing=how == "blocks")
        model = net if how == "float32" else BF16Weights(net)
        if isinstance(model, BF16Weights):
            compile_network(model._twin[0], how, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in (1, 2):
            loss(model(*micro_batch(seed)), seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[how] = [p.detach() for p in net.parameters()]
    for first, plain, blocks, step in zip(start, ends["off"], ends["blocks"], ends["step"], strict=True):
        assert torch.equal(step, plain)
        # What starts at zero consists of rounded gradients alone, those of biases before a softmax of nothing else.
        assert not first.any() or relative_error(blocks, plain) < 1e-2
    changes = {
        how: torch.cat([(a - b).flatten() for a, b in zip(end, start, strict=True)]) for how, end in ends.items()
    }
    errors = {how: (changes[how] - changes["float32"]).norm() for how in ("off", "blocks")}
    assert errors["blocks"] < 1.25 * errors["off"] < 0.05 * changes["float32"].norm()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "step"])
def test_a_compiled_twin_has_the_networks_parameters(how: Compile) -> None:
    """Updated, averaged and exchanged weights are computed with; the network itself is not compiled."""
    net = network()
    model, ema = Compiled(net, how), EMA(net)
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    assert {f"network.{key}" for key in net.state_dict()} == model.state_dict().keys()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(*micro_batch(1)).detach()
    loss(model(*micro_batch(1)), 1).backward()
    optimizer.step()
    after = model(*micro_batch(1)).detach()
    assert relative_error(after, before) > 0.01 and relative_error(after, net(*micro_batch(1))) < 1e-4
    with ema.applied(net):
        assert relative_error(model(*micro_batch(1)), before) < 1e-4
    assert all(module._compiled_call_impl is None for module in net.modules())


def test_frozen_weights_are_rounded_and_get_no_gradient() -> None:
    """Stage 1 with a frozen encoder; two outputs, and an input that is None."""
    vae = tiny_vae()
    vae.encoder.requires_grad_(False)
    reconstruction, moments = BF16Weights(vae)(normal(1, 3, 16, 16), None)
    assert reconstruction.dtype == moments.dtype == torch.float32
    reconstruction.square().mean().backward()
    assert vae.encoder.conv_in.weight.grad is None and vae.decoder.conv_in.weight.grad is not None
    expected, _ = by_hand(vae)(normal(1, 3, 16, 16).bfloat16())
    assert torch.equal(reconstruction, expected.float())


def test_precision_and_weights_must_agree() -> None:
    with pytest.raises(ValueError, match=r"precision is fp32, but weights bf16 compute in bf16; set precision to auto"):
        load_config(UNetTrainingConfig, TINY_UNET[0], [*TINY_UNET[1:], "train.weights=bf16"])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> Path:
    return run_unet(tmp_path_factory.mktemp("bf16") / "run", vae_run, *BF16)


def cut_off(run: Path, folder: Path) -> Path:
    """A copy of a finished run as it was after step 3."""
    cut = shutil.copytree(run, folder)
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    for path in cut.glob("*.json"):
        path.unlink()
    return cut


@pytest.mark.runs
def test_a_run_keeps_float32_and_resumes_bitwise(tmp_path: Path, vae_run: Path, unet_run: Path, bf16_run: Path) -> None:
    cut = run_unet(cut_off(bf16_run, tmp_path / "cut"), vae_run, *BF16)
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step_00000006/{name}.safetensors"
        assert_same_weights(bf16_run, cut, file)
        of_float32, of_bf16 = load_file(unet_run / file), load_file(bf16_run / file)
        assert {k: (t.dtype, t.shape) for k, t in of_bf16.items()} == {
            k: (t.dtype, t.shape) for k, t in of_float32.items()
        }
    assert metrics(cut, "loss") == metrics(bf16_run, "loss")
    exported = "unet/diffusion_pytorch_model.safetensors"
    assert {k: t.dtype for k, t in load_file(bf16_run / exported).items()} == {
        k: t.dtype for k, t in load_file(unet_run / exported).items()
    }
    assert metrics(bf16_run, "loss") == pytest.approx(metrics(unet_run, "loss"), rel=0.02)


@pytest.mark.runs
def test_a_run_resumes_with_the_other_weights(
    tmp_path: Path, vae_run: Path, unet_run: Path, bf16_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for before, after in ((unet_run, BF16), (bf16_run, [])):
        changed = run_unet(cut_off(before, tmp_path / before.parent.name), vae_run, *after)
        first, second = ("bf16", "float32") if before is bf16_run else ("float32", "bf16")
        assert f"train.weights '{first}' -> '{second}'" in capsys.readouterr().out
        losses = metrics(changed, "loss")
        assert [losses[step] for step in (1, 2, 3)] == [metrics(before, "loss")[step] for step in (1, 2, 3)]
        assert losses == pytest.approx(metrics(unet_run, "loss"), rel=0.02)


@pytest.mark.runs
def test_stage_1_trains_with_bf16_weights_and_a_discriminator(tmp_path: Path, vae_run: Path) -> None:
    """The adversarial term weighs itself by gradients of the decoder's last layer, which is a master."""
    run = run_vae(
        tmp_path / "run", *BF16, "loss.adversarial=hinge", "loss.adversarial_start=3", "loss.discriminator_layers=1"
    )
    plain, ours = metrics(vae_run, "loss"), metrics(run, "loss")
    assert [ours[step] for step in (1, 2, 3)] == pytest.approx([plain[step] for step in (1, 2, 3)], rel=0.02)
    assert metrics(run, "adversarial")[4] != 0 and math.isfinite(ours[6])


@pytest.mark.runs
def test_two_processes_and_snapshots(tmp_path: Path, vae_run: Path, bf16_run: Path) -> None:
    """Gradients are averaged in float32, as those of one process; micro-batches are rounded apart."""
    extra = ["train.micro_batch_size=2", "ema.snapshot_every=3"]
    launch(2, arguments(2, tmp_path / "run", vae_run, *BF16, *extra))
    assert metrics(tmp_path / "run", "loss") == pytest.approx(metrics(bf16_run, "loss"), rel=0.01)
    assert len(list((tmp_path / "run" / "ema_snapshots").iterdir())) == 2


@pytest.mark.runs
def test_sharded_weights_are_refused(tmp_path: Path, vae_run: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", FSDP2, "--main_process_port=0"]
    process = start([*launcher, *arguments(2, tmp_path / "run", vae_run, *BF16)], ACCELERATE_USE_CPU="true")
    assert "train.weights bf16 does not work under FSDP2" in finish(process, expected=1)
    process = start(
        [*launcher, *arguments(2, tmp_path / "run", vae_run, "train.compile=step")], ACCELERATE_USE_CPU="true"
    )
    assert "train.compile step does not work under FSDP2" in finish(process, expected=1)

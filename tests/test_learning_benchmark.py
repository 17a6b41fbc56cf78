"""benchmarks/learning: the variants are what their names say, costs and statistics are right."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.stats import hypergeom
from scripts import ROOT
from tiny import normal
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss

from benchmarks.learning.autoencoders import VARIANTS as AUTOENCODERS
from benchmarks.learning.measure import StepClock, as_velocity, flops_per_step
from benchmarks.learning.run import with_steps
from benchmarks.learning.table import curves, p_value, tables
from benchmarks.learning.twin import build_twin, build_twin_optimizer
from benchmarks.learning.variants import VARIANTS, dispersion
from latentdiff.config import AutoencoderKLConfig, UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.evaluation.scores import Rate
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.training.ema import ema_decay_at
from latentdiff.training.optimizer import build_optimizer
from latentdiff.training.run import Run

BASE = ROOT / "configs/demo/unet.yaml"
SMALL = (
    "model.block_out_channels=[32, 32, 64]",
    "text.config={hidden_size: 128, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}",
)


def config_of(*overrides: str) -> UNetTrainingConfig:
    return load_config(UNetTrainingConfig, BASE, with_steps(["model.sample_size=16", *overrides], 3))


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_one_change_of_a_valid_config(name: str) -> None:
    variant = VARIANTS[name]
    reference = config_of(*(VARIANTS["twin"].overrides if variant.twin else ()))
    plain, changed = reference.model_dump(mode="json"), config_of(*variant.overrides).model_dump(mode="json")
    changes = [section for section in plain if plain[section] != changed[section]]
    assert len(changes) <= 1
    assert (name == "baseline") == (variant == VARIANTS["baseline"])


def initial(name: str) -> UNet:
    with VARIANTS[name].change():
        return UNet.from_config(config_of(*SMALL).model, 3)


def zeros(unet: UNet) -> set[str]:
    """The last part of the names of the layers whose weights are 0."""
    kinds = nn.Conv2d | nn.Linear
    layers = ((name, module) for name, module in unet.named_modules() if isinstance(module, kinds))
    return {name.rpartition(".")[2] for name, module in layers if not module.weight.any()}


def test_initial_weights_of_the_variants() -> None:
    assert zeros(initial("baseline")) == {"conv2", "proj_out", "conv_out"}
    assert zeros(initial("zero-conv-out-only")) == {"conv_out"}
    unet, same = initial("default-init"), initial("default-init")
    assert zeros(unet) == set() and unet.conv_in.bias.any()
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), same.parameters(), strict=True))
    assert unet.conv_in.weight.std().item() == pytest.approx((1 / 3 / 36) ** 0.5, rel=0.05)  # torch's default
    assert zeros(initial("baseline")) == {"conv2", "proj_out", "conv_out"}  # the change ends with its context


def test_ema_without_warm_up() -> None:
    import train_unet

    with VARIANTS["no-ema-warmup"].change():
        assert train_unet.ema_decay_at(0, 0.99) == 0.99
    assert train_unet.ema_decay_at is ema_decay_at


def test_dispersion_is_added_to_the_training_loss() -> None:
    import train_unet

    features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # Squared distances per dimension 1, 2 and 1; over the temperature of 0.5; each pair twice, and three zeros.
    expected = math.log((3 + 4 * math.exp(-2) + 2 * math.exp(-4)) / 9)
    assert dispersion(features).item() == pytest.approx(expected, rel=1e-6)
    config = config_of(*SMALL)
    network = TextConditionedUNet(UNet.from_config(config.model, 3), None)
    latents, noise, context = normal(2, 4, 16, 16), normal(2, 4, 16, 16, seed=1), normal(2, 5, 128, seed=2)
    values = (network, config.diffusion, latents, context, noise, torch.tensor([100, 900]), config.loss)
    plain = train_unet.diffusion_loss(*values)
    captured: list[Tensor] = []
    network.unet.mid_block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    with VARIANTS["dispersive"].change():
        more = train_unet.diffusion_loss(*values)
    torch.testing.assert_close(more - plain, (0.5 * dispersion(captured[0])).expand(2))
    assert (more < plain).all()
    torch.testing.assert_close(train_unet.diffusion_loss(*values), plain)


@pytest.mark.runs
def test_twin_has_the_shapes_and_the_cost_of_the_baseline() -> None:
    config = config_of(*SMALL, "train.batch_size=3", *VARIANTS["twin"].overrides)
    twin = build_twin(config)
    ours = TextConditionedUNet(UNet.from_config(config.model, 0), TextEncoder.from_config(config.text.config, 0))
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    ids, latents, timesteps = torch.zeros(2, 9, dtype=torch.long), normal(2, 4, 16, 16), torch.tensor([3, 900])
    ours.load_state_dict(twin.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(latents, timesteps, ids), twin(latents, timesteps, ids), atol=1e-5, rtol=1e-4)
    cost = flops_per_step(ours, build_optimizer(ours, config.optimizer), config, 9)
    assert cost == flops_per_step(twin, build_twin_optimizer(twin, config), config, 9)
    assert cost == 3 * flops_per_step(
        ours, build_optimizer(ours, config.optimizer), config_of(*SMALL, "train.batch_size=1"), 9
    )
    muon = config_of(*SMALL, "train.batch_size=3")
    assert flops_per_step(ours, build_optimizer(ours, muon.optimizer), muon, 9) > cost


def test_flops_of_a_linear_layer() -> None:
    """Two for each weight and token on the way there, twice that on the way back: here without the input's part."""

    class OneProduct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    network = OneProduct()
    optimizer = torch.optim.AdamW(network.parameters())
    tokens = 4 * 16  # channels x rows of the latents, each a row of 16
    assert flops_per_step(network, optimizer, config_of("train.batch_size=5"), 9) == 5 * 2 * (2 * 16 * 16 * tokens)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_any_output_as_velocity(prediction_type: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type)
    latents, noise = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1)
    timesteps = torch.tensor([20, 400, 999])
    noisy, output = (make(latents, noise, timesteps) for make in (schedule.add_noise, schedule.target))
    expected = replace(schedule, prediction_type="v_prediction").target(latents, noise, timesteps)
    torch.testing.assert_close(as_velocity(schedule, output, noisy, timesteps), expected, atol=1e-4, rtol=1e-4)


def test_clock_watches_a_training_script(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Run, "report", lambda run, step, *values: steps.append(step))
    clock, run = StepClock(), Run.__new__(Run)
    with clock.watching():
        for step in range(4):
            run.report(step, 8, {})
    run.report(4, 8, {})
    assert steps == [0, 1, 2, 3, 4] and len(clock.seconds) == 3 and min(clock.seconds) >= 0


@pytest.mark.parametrize(("one", "other"), [((3, 20), (11, 20)), ((5, 12), (5, 30)), ((7, 7), (7, 7))])
def test_p_value_is_the_sum_of_the_less_likely_tables(one: tuple[int, int], other: tuple[int, int]) -> None:
    hits, total = one[0] + other[0], one[1] + other[1]
    chances = [float(hypergeom.pmf(k, total, hits, one[1])) for k in range(hits + 1)]
    expected = sum(chance for chance in chances if chance <= chances[one[0]] * (1 + 1e-9))
    assert p_value(Rate(*one), Rate(*other)) == pytest.approx(expected)


def row(variant: str, seed: int, exact: int, **changes: object) -> dict[str, object]:
    return {
        **{"variant": variant, "seed": seed, "exact": exact, "prompts": 20, "copies": 1, "psnr": 14.0 + seed},
        **{"budget": {"steps": 10}, "base": "unet.yaml", "overrides": [], "vae": "v", "vae_sha256": "0"},
        **{"steps": 10, "flops_per_step": 5e11, "cpu_seconds_per_step": 0.5, "validation_loss": 0.25},
        **changes,
    }


def test_table_pools_the_seeds() -> None:
    rows = [row("muon", 0, 9), row("baseline", 0, 3), row("baseline", 1, 5), row("muon", 1, 11)]
    rows.append(row("baseline", 0, 1, budget={"seconds": 60.0}, cpu_seconds_per_step=None))
    text = tables(json.loads(json.dumps(rows)), "baseline")
    first, second = text.split("\n\n60 seconds")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()[2:]]
    by_name = {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}
    assert by_name["muon"]["exact"].startswith("20 / 40 (") and by_name["baseline"]["exact"].startswith("8 / 40 (")
    assert by_name["muon"]["exact by seed"] == "50% (45% .. 55%)" and by_name["muon"]["copies"] == "2"
    assert by_name["muon"]["p"] == f"{p_value(Rate(20, 40), Rate(8, 40)):.2g}" and by_name["baseline"]["p"] == ""
    assert by_name["muon"]["PSNR to the truth (dB)"] == "14.50 (14.00 .. 15.00)" and by_name["muon"]["TFLOPs"] == "5"
    assert "1 / 20 (" in second and "muon" not in second


def test_curves_are_those_of_variants_with_several_budgets() -> None:
    rows = [row("muon", 0, 9), row("baseline", 0, 3), row("baseline", 1, 5), row("baseline", 0, 8, steps=20)]
    exact, psnr, _ = curves(rows).axes
    assert [line.get_label() for line in exact.lines] == ["baseline"]
    assert exact.lines[0].get_xydata().tolist() == [[5, pytest.approx(4 / 20)], [10, pytest.approx(8 / 20)]]
    assert psnr.collections[0].get_offsets().tolist() == [[5, 14], [5, 15], [10, 14]]
    with pytest.raises(ValueError, match="at least two budgets"):
        curves(rows[:3])


def test_autoencoder_variants_are_valid() -> None:
    base = ROOT / "configs/demo/vae.yaml"
    plain = load_config(VAETrainingConfig, base, [])
    for name, variant in AUTOENCODERS.items():
        config = load_config(VAETrainingConfig, base, list(variant.overrides))
        assert (config == plain) == (name in ("baseline", "eq-vae"))
    whole = load_config(VAETrainingConfig, base, list(AUTOENCODERS["whole-images"].overrides)).train.steps
    crops = plain.train.steps - plain.train.whole_image_steps
    assert plain.train.crop_size is not None
    assert whole == crops * (plain.train.crop_size / plain.data.size) ** 2 + plain.train.whole_image_steps


def test_equivariant_autoencoder_sees_every_transformation() -> None:
    """The loss is that of one of eight transformations, or of none, computed here without the detour."""
    config = AutoencoderKLConfig(block_out_channels=(16, 16), norm_num_groups=4)
    vae = AutoencoderKL.from_config(config, seed=0).train()
    pixels, noise = normal(2, 3, 16, 16, seed=1), normal(2, 4, 8, 8, seed=2)
    latents = vae.sample(vae.encode(pixels), noise)
    expected = [mse_loss(vae.decode(latents), pixels).item()]
    for turns, halve in product(range(4), (False, True)):
        z, x = latents.rot90(turns, (2, 3)), pixels.rot90(turns, (2, 3))
        if halve:
            z, x = avg_pool2d(z, 2), avg_pool2d(x, 2)
        expected.append(mse_loss(vae.decode(z), x).item())
    seen = set()
    with AUTOENCODERS["eq-vae"].change():
        for _ in range(60):
            error = mse_loss(vae(pixels, noise)[0], pixels).item()
            places = [i for i, value in enumerate(expected) if error == pytest.approx(value, rel=1e-5)]
            assert places, error
            seen.update(places)
        with torch.no_grad():
            assert torch.equal(vae(pixels)[0], vae.decode(vae.sample(vae.encode(pixels))))
    assert seen == set(range(9))

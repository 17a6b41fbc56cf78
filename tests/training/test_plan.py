"""What a training will take, counted and measured, compared with trainings that ran."""

import resource
from pathlib import Path

import pytest
import torch
from scripts import ROOT, TINY_UNET, TINY_VAE, metrics, run_vae
from torch import nn

from latentdiff.commands.cli import main
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.data.captioned_images import open_run_images
from latentdiff.diffusion.objective import diffusion_loss
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.training.plan import (
    LiveMemory,
    Speed,
    completed,
    counts,
    duration,
    expectation,
    flops_by_step,
    measure,
    seconds_of,
    vae_config_of,
)
from latentdiff.training.plan import plan as plan_of
from latentdiff.training.run import Run

CPU = torch.device("cpu")


def test_live_memory_of_a_known_computation() -> None:
    """x [64, 32] float32 is 8,192 bytes, as is each of the results that are alive."""
    with LiveMemory() as memory:
        x = torch.zeros(64, 32)
        assert memory.now == 8192
        y = x + 1
        z = y * 2
        assert memory.now == memory.peak == 3 * 8192
        view = z.view(-1)
        del y, z
        assert memory.now == 2 * 8192 and view.numel() == 2048
        del view
        assert memory.now == 8192 and memory.peak == 3 * 8192


def test_live_memory_of_a_backward_pass() -> None:
    """In the end weights and gradients are alive; at most, the output and its gradient besides them."""
    weights, output = 4 * (100 * 200 + 200), 4 * 50 * 200
    with LiveMemory() as memory:
        layer, x = nn.Linear(100, 200), torch.ones(50, 100)
        inputs = 4 * 50 * 100
        layer(x).backward(torch.ones(50, 200))
        assert memory.now == 2 * weights + inputs
    assert memory.peak == 2 * weights + inputs + 2 * output


@pytest.fixture
def stage_1() -> VAETrainingConfig:
    return load_config(VAETrainingConfig, TINY_VAE[0], TINY_VAE[1:])


def stage_2(vae: str, *overrides: str) -> UNetTrainingConfig:
    return load_config(UNetTrainingConfig, TINY_UNET[0], [*TINY_UNET[1:], f"vae={vae}", *overrides])


def test_counts_of_stage_1(stage_1: VAETrainingConfig) -> None:
    found = counts(stage_1, stage_1.model, 20, CPU)
    model = AutoencoderKL(stage_1.model)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert found.parameters == {"autoencoder": weights // 4}
    buffers = 4 * sum(b.numel() for b in model.buffers())
    assert abs(found.weights_bytes - weights - buffers) < 0.02 * weights
    # The EMA, and the copy of the best weights; two moments of AdamW.
    assert found.copies_bytes == found.checkpoint_bytes - weights  # all but the best weights
    assert found.averages_bytes == 2 * weights and 2 * weights <= found.optimizer_bytes < 2.05 * weights
    assert found.peak_bytes > found.weights_bytes + found.averages_bytes + found.optimizer_bytes
    smaller = counts(stage_1.model_copy(update={"train": stage_1.train.model_copy(update={"micro_batch_size": 2})}),
                     stage_1.model, 20, CPU)  # fmt: skip
    assert smaller.flops == found.flops and smaller.step_bytes < 0.6 * found.step_bytes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_counted_leaves_nothing_without_values_behind(vae_run: Path, prediction: str) -> None:
    """A schedule that only this test has: its tables, which are kept for good, are first needed by the count."""
    overrides = ["diffusion.num_train_timesteps=321", "loss.weighting=min_snr", "validation.bins=3"]
    config = stage_2(str(vae_run), f"diffusion.prediction_type={prediction}", *overrides)
    vae = vae_config_of(config, Path("unet.yaml"))
    config = completed(config, vae)
    counts(config, vae, 20, CPU)
    clean, noise, steps = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.tensor([0, 320])
    loss = diffusion_loss(lambda x, *_: x, config.diffusion, clean, clean, noise, steps, config.loss)
    abar = config.diffusion.alphas_cumprod[steps].float()
    snr, sigma = abar / (1 - abar), (1 - abar).sqrt()
    error = (sigma - (1 if prediction == "epsilon" else abar.sqrt())) ** 2
    weight = snr.clamp(max=config.loss.min_snr_gamma) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(loss, error * weight)


def test_flops_are_those_of_the_layers(stage_1: VAETrainingConfig) -> None:
    """By hand: each convolution and linear layer forward, and twice backward, but the input needs no gradient."""
    model, layers = AutoencoderKL(stage_1.model), []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        layers.append(2 * output.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.zeros(1, stage_1.model.in_channels, *stage_1.data.shape), None)
    # Attention in the middle of both halves: two products forward, four backward, of 8 x 8 places and 16 channels.
    attention = 2 * (2 + 4) * 2 * 64 * 64 * 16
    assert flops_by_step(stage_1, stage_1.model)(0) == 3 * sum(layers) - layers[0] + attention


def test_flops_without_what_checkpointing_repeats_and_by_step(stage_1: VAETrainingConfig) -> None:
    """Crops of a quarter of the pixels until the last two steps."""
    overrides = ["train.crop_size=8", "train.whole_image_steps=2", "train.gradient_checkpointing=true"]
    crops = load_config(VAETrainingConfig, TINY_VAE[0], [*TINY_VAE[1:], *overrides])
    at = flops_by_step(crops, crops.model)
    whole = flops_by_step(stage_1, stage_1.model)(0)
    assert at(0) == at(3) < whole / 3.9 and at(4) == at(5) == whole == counts(stage_1, stage_1.model, 20, CPU).flops
    assert counts(crops, crops.model, 20, CPU).flops > whole


def test_flops_are_the_same_in_every_implementation(vae_run: Path) -> None:
    """Also where latents are so many that upsampling is a transposed convolution, whose operations are fewer."""
    found = set()
    for override in (
        "train.weights=bf16",
        "model.upcast_attention=true",
        "train.compile=blocks",
        "train.batch_size=256",
    ):
        config = stage_2(str(vae_run), "train.precision=bf16", override)
        vae = vae_config_of(config, Path("unet.yaml"))
        config = completed(config, vae)
        found |= {counts(config, vae, 20, CPU).flops, flops_by_step(config, vae)(0)}
    assert len(found) == 1


@pytest.mark.runs
def test_utilisation_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_1: VAETrainingConfig) -> None:
    """On a device whose peak is 2 GFLOP/s; the first step is not counted."""
    monkeypatch.setattr(Run, "_peak_flops", lambda run: 2e9)
    run = run_vae(tmp_path / "run")
    speeds, shares = metrics(run, "images_per_second"), metrics(run, "mfu")
    assert list(speeds) == list(shares) == [2, 3, 4, 5, 6]
    of_an_image = flops_by_step(stage_1, stage_1.model)(0)
    for step, share in shares.items():
        assert share == pytest.approx(speeds[step] * of_an_image / 2e9, rel=1e-6)
    assert all(memory > 1e8 for memory in metrics(run, "peak_memory").values())
    assert list(metrics(run, "seconds")) == [1, 2, 3, 4, 5, 6]


def test_rounded_weights_are_counted() -> None:
    """Two bytes a parameter in memory, none on the disk; and the copies that autocast keeps are gone."""
    found = {}
    for weights in ("float32", "bf16"):
        overrides = ["train.precision=bf16", f"train.weights={weights}", "train.micro_batch_size=1"]
        config = load_config(VAETrainingConfig, TINY_VAE[0], [*TINY_VAE[1:], *overrides])
        found[weights] = counts(config, config.model, 20, CPU)
    layers = [m for m in AutoencoderKL(config.model).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    rounded = sum(p.numel() for layer in layers for p in layer.parameters())  # on a CPU, norms keep float32
    assert found["bf16"].weights_bytes - found["float32"].weights_bytes == 2 * rounded
    assert found["bf16"].checkpoint_bytes == found["float32"].checkpoint_bytes
    assert found["bf16"].optimizer_bytes == found["float32"].optimizer_bytes
    assert found["bf16"].flops == found["float32"].flops
    assert found["bf16"].step_bytes < found["float32"].step_bytes


@pytest.mark.runs
def test_disk_is_what_a_run_takes(unet_run: Path) -> None:
    config = load_config(UNetTrainingConfig, unet_run / "config.yaml")
    found = counts(config, vae_config_of(config, unet_run / "config.yaml"), 20, CPU)
    checkpoint = max((unet_run / "checkpoints").iterdir())
    taken = sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix == ".safetensors")
    assert found.checkpoint_bytes == pytest.approx(taken, rel=0.1)
    cached = sum(path.stat().st_size for path in (unet_run / "latents").rglob("*.safetensors"))
    assert found.cache_bytes == pytest.approx(cached, rel=0.1)


def test_before_stage_1_its_config_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no saved/demo-vae
    folder = tmp_path / "mine"
    main(["configs", "demo", "--write", str(folder)])
    config = load_config(UNetTrainingConfig, folder / "unet.yaml")
    vae = vae_config_of(config, folder / "unet.yaml")
    assert vae == load_config(VAETrainingConfig, ROOT / "configs/demo/vae.yaml").model
    done = completed(config, vae)
    assert isinstance(done, UNetTrainingConfig)
    assert (done.model.in_channels, done.model.sample_size) == (4, 16)
    # A null that is written, as in configs/reference, is the same as none.
    assert completed(load_config(UNetTrainingConfig, folder / "unet.yaml", ["model.sample_size=null"]), vae) == done
    (folder / "vae.yaml").unlink()
    with pytest.raises(
        ValueError, match="^vae 'saved/demo-vae' is no folder .*; train one with .*, or put the config of stage 1 in"
    ):
        vae_config_of(config, folder / "unet.yaml")


def test_time_is_the_sum_of_what_is_done(stage_1: VAETrainingConfig) -> None:
    """With made-up speeds: 6 steps; validations at 0, 3 and 6 of 4 images, with as many in the grid; 20 encoded."""
    found = plan_of(Path(TINY_VAE[0]), stage_1, CPU, measured=True, progress=False)
    assert found.images == 20 and found.held_out == 4 and found.epochs == 6 * 8 / 20
    fixed = Speed(2.0, 5.0, validated=0.5, reported=3.0, encoded=0.25, decoded=0.75, chart=0.125)
    spent = seconds_of(stage_1, fixed, range(20), range(4))  # pyright: ignore (only their number counts)
    assert spent == {
        "steps": 12.0,
        "validation": 3 * (4 * 0.5 + 4 * 1.0),
        "the scale of the latents": 5.0,
        "the report": 4 * 3.0 + 4 * 0.125,
    }


def test_what_is_measured(stage_1: VAETrainingConfig) -> None:
    """Every part takes time; the memory is that of the process, and with it that of the best step's weights."""
    images, held_out = open_run_images(stage_1, stage_1.model, progress=False)
    speed = measure(stage_1, stage_1.model, CPU, held_out, seconds=1.0)
    parts = (speed.step, speed.whole_step, speed.validated, speed.reported, speed.encoded, speed.decoded, speed.chart)
    assert min(parts) > 0 and speed.forward == 0
    assert speed.peak_bytes is not None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    copies = 4 * sum(p.numel() for p in AutoencoderKL(stage_1.model).parameters())
    assert speed.peak_bytes == pytest.approx(most + copies, rel=0.02)


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (100, "2 min"), (5399, "90 min"), (12000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text.replace("90 min", "1 h 30 min")


def test_what_to_expect_depends_on_the_number_of_images() -> None:
    assert "copies of them" in expectation(30) and "new combinations of" in expectation(3000)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The full Stable Diffusion 1 shapes are counted without their weights; what is not counted is said."""
    overrides = ["data.source=embedded", "data.caption_column=null", "data.holdout=8", "data.size=64"]
    main(["plan", str(ROOT / "configs/systems/pokemon-512/vae.yaml"), *overrides, "--no-measure", "--no-progress"])
    text = capsys.readouterr().out
    assert "autoencoder 83.7 M" in text and "120 to train on, 8 held out" in text and "speed" not in text
    with pytest.raises(SystemExit):
        main(["plan", str(ROOT / "configs/demo"), "train.steps=3"])
    assert "may be of either stage" in capsys.readouterr().err

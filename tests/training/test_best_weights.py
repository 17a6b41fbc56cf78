"""The weights of the best validation: their choice, over a resume and on two processes, and what is published."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from scripts import arguments, assert_same_weights, launch, metrics, run_unet, run_vae
from states import equal, new_state, output, small_model, weights

from latentdiff.config import load_run_config
from latentdiff.data.captioned_images import open_images
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.best_weights import BestWeights
from latentdiff.training.checkpoint import checkpoint_folder, resume, save_checkpoint
from latentdiff.training.vae_model import initial_autoencoder, scale_latents

# Four sensible steps, then steps that are far too large: the best validation is neither the first nor the last.
STEPS = 8
RISING = [
    *("optimizer.lr=null", "optimizer.lr_schedule=staged", "optimizer.lr_stages=[[5.0e-3, 4], [0.3, 100]]"),
    *("optimizer.warmup_steps=0", f"train.steps={STEPS}", "validation.every=2"),
    *("output.checkpoint_every=2", "output.keep=9"),
]


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def move(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights after a change."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    return weights(model)


def test_lowest_finite_loss_is_kept_and_the_earlier_of_two() -> None:
    best, model = BestWeights("validation loss"), small_model()
    model[0].requires_grad_(False)
    losses = [math.nan, 0.9, 0.5, math.nan, 0.5, 0.7, -math.inf + math.inf, math.inf]
    chosen, copies = [], []
    for step, loss in enumerate(losses):
        copies.append(move(model))
        best.offer(step, loss, model)
        chosen.append(best.step)
    assert chosen == [None, 1, 2, 2, 2, 2, 2, 2] and best.loss == 0.5
    assert best.average.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}  # those that are trained
    assert all(torch.equal(tensor, copies[2][name]) for name, tensor in best.average.items())
    best.offer(8, 0.69, model)
    assert best.reason() == "the lowest validation loss (0.5; the last step has 0.69)"
    best.offer(9, 0.125, model)
    assert best.reason() == "the lowest validation loss (0.125)"


def test_checkpoint_keeps_the_best_weights(tmp_path: Path, accelerator: Accelerator) -> None:
    """Before there are any too; a checkpoint of a run that publishes the last ones is refused, not guessed at."""
    saved = new_state(accelerator)
    saved.best = BestWeights("validation loss")
    loaded = new_state(accelerator, seed=1)
    loaded.best = BestWeights("validation loss")
    for step, loss in enumerate([math.nan, 0.1 + 0.2, math.nan]):
        move(saved.model)
        saved.best.offer(step, loss, saved.model)
        saved.step = step + 1
        save_checkpoint(tmp_path, saved, output(), accelerator)
        assert resume(tmp_path, loaded, "latest", accelerator)
        assert (loaded.best.step, loaded.best.loss) == (saved.best.step, saved.best.loss)
        assert equal(loaded.best.average, saved.best.average)
    assert loaded.best.step == 1 and math.isnan(loaded.best.last_loss)
    assert resume(tmp_path, new_state(accelerator), "latest", accelerator)  # they may be given up

    saved.best, saved.step = None, 5
    save_checkpoint(tmp_path, saved, output(), accelerator)
    with pytest.raises(ValueError) as error:
        resume(tmp_path, loaded, "latest", accelerator)
    assert str(error.value) == (
        f"{checkpoint_folder(tmp_path, 5)} has no best weights: it was written by a run that publishes the last ones; "
        "set output.publish to last, or start over with --resume never"
    )
    assert loaded.step == 3


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def rising(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> dict[int, Path]:
    """A run of each stage whose validation loss rises in the end."""
    folder = tmp_path_factory.mktemp("rising")
    return {1: run_vae(folder / "vae", *RISING), 2: run_unet(folder / "unet", vae_run, *RISING)}


def best_step(stage: int, run: Path) -> int:
    """By the log."""
    losses = metrics(run, "validation/mse" if stage == 1 else "validation/loss")
    assert list(losses) == list(range(0, STEPS + 1, 2))
    return min(losses, key=lambda step: losses[step])


def average_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folder(run, step) / "ema.safetensors")


def assert_published(stage: int, run: Path, step: int) -> None:
    """The final model is that of the averaged weights in the checkpoint at a step, bit for bit."""
    assert metrics(run, "published_step") == {STEPS: step}
    average = average_at(run, step)
    if stage == 2:
        pipeline = LatentDiffusionPipeline.from_pretrained(run)
        assert equal(weights(TextConditionedUNet(pipeline.unet, pipeline.text_encoder)), average)
        return
    config = load_run_config(run / "config.yaml")
    AcceleratorState._reset_state(reset_partial_state=True)
    vae = initial_autoencoder(config)
    vae.load_state_dict(average)
    images, _ = open_images(config.data, 3, config.train.seed, progress=False)
    scale_latents(vae.eval(), config, images.batches(config.validation.batch_size), Accelerator())
    published = AutoencoderKL.from_pretrained(run).state_dict()
    for name, tensor in vae.state_dict().items():
        torch.testing.assert_close(published[name], tensor, rtol=1e-5, atol=1e-6)
        assert "quant" in name or torch.equal(published[name], tensor), name


def again(stage: int, run: Path, vae: Path, *overrides: str) -> None:
    run_vae(run, *RISING, *overrides) if stage == 1 else run_unet(run, vae, *RISING, *overrides)


@pytest.mark.runs
@pytest.mark.parametrize("stage", [1, 2])
def test_best_step_is_published_and_the_last_on_request(
    stage: int, tmp_path: Path, vae_run: Path, rising: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    step = best_step(stage, rising[stage])
    assert 0 < step < STEPS
    assert_published(stage, rising[stage], step)

    run = shutil.copytree(rising[stage], tmp_path / "run")
    again(stage, run, vae_run)
    measure, key = ("held-out MSE", "mse") if stage == 1 else ("validation loss", "loss")
    losses = metrics(run, f"validation/{key}")
    assert (
        f"published: step {step} of {STEPS}, the lowest {measure} ({losses[step]:.4g}; the last step has "
        f"{losses[STEPS]:.4g})\n"
    ) in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == (rising[stage] / "metrics.jsonl").read_text()

    again(stage, run, vae_run, "output.publish=last")
    assert f"published: step {STEPS} of {STEPS}, the last one (output.publish is last)\n" in capsys.readouterr().out
    assert_published(stage, run, STEPS)


@pytest.mark.runs
@pytest.mark.parametrize("stage", [1, 2])
def test_resume_after_the_best_step_publishes_the_same(
    stage: int, tmp_path: Path, vae_run: Path, rising: dict[int, Path]
) -> None:
    """What the uninterrupted run does, bit for bit: later checkpoints no longer have the best step's own files."""
    run = shutil.copytree(rising[stage], tmp_path / "run")
    step = best_step(stage, run)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != checkpoint_folder(run, STEPS - 2).name:
            shutil.rmtree(checkpoint)
    assert step < STEPS - 2
    models = [path.relative_to(run) for path in run.rglob("*.safetensors") if "checkpoints" not in path.parts]
    for model in models:
        if model.parts[0] != "latents":
            (run / model).unlink()
    again(stage, run, vae_run)
    for model in models:
        assert_same_weights(rising[stage], run, str(model))
    assert_same_weights(rising[stage], run, f"checkpoints/step_{STEPS:08d}/best.safetensors")
    assert metrics(run, "published_step") == {STEPS: step}


@pytest.mark.runs
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_publish_the_same_step(
    stage: int, tmp_path: Path, vae_run: Path, rising: dict[int, Path]
) -> None:
    run = tmp_path / "run"
    step = best_step(stage, rising[stage])
    assert f"published: step {step} of {STEPS}" in launch(2, arguments(stage, run, vae_run, *RISING))
    assert_published(stage, run, step)
    for name, tensor in average_at(rising[stage], step).items():
        torch.testing.assert_close(average_at(run, step)[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.runs
def test_without_a_choice_the_last_step_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No held-out images; an adversarial loss; a term of the loss that has not started."""
    steps = ["train.steps=1", "output.checkpoint_every=1"]
    for number, (overrides, reason) in enumerate(
        [
            (["data.holdout=0"], "there is no validation set"),
            (["loss.adversarial=hinge", "loss.discriminator_layers=1"], "the default with an adversarial loss"),
            (["loss.kl_start=1"], "no usable validation loss"),
        ]
    ):
        run = run_vae(tmp_path / str(number), *steps, *overrides)
        assert f"published: step 1 of 1, the last one ({reason})\n" in capsys.readouterr().out
        files = {path.name for path in checkpoint_folder(run, 1).iterdir()}
        assert ("best.safetensors" in files) == (number == 2)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last == {"step": 1, "published_step": 1}

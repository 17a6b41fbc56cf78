"""Stage 2's validation against hand-computed numbers; neither batches nor processes change what is measured.

Run as a script, this file is one process of a launch: it writes what it measured into the given folder.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import normal, tiny_pipeline, tiny_unet, tiny_vae
from torch import Tensor
from two_processes import run_on_two_processes

from latentdiff.config import UNetValidationConfig
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.pipeline import GenerationDefaults
from latentdiff.training.arguments import run_as_command
from latentdiff.training.unet_evaluation import (
    BinnedLoss,
    gap_metrics,
    generate_validation_images,
    prompts_at,
    validation_loss,
)

PROMPTS = ["a red apple", "a rocket", "a smiling face"]


class Recorder:
    """A model that returns `answer(noisy_latents, timesteps, images)` and records its inputs.

    Its condition is the indices of the images.
    """

    def __init__(self, answer=lambda noisy, timesteps, images: torch.zeros_like(noisy)) -> None:
        self.answer = answer
        self.images: list[int] = []
        self.timesteps: list[int] = []
        self.noisy: list[Tensor] = []

    def __call__(self, noisy: Tensor, timesteps: Tensor, images: Tensor) -> Tensor:
        self.images += images.tolist()
        self.timesteps += timesteps.tolist()
        self.noisy += list(noisy)
        return self.answer(noisy, timesteps, images)


def measured(model, latents: Tensor, bins: int = 10, batch_size: int = 16, **schedule) -> BinnedLoss:
    return validation_loss(model, NoiseSchedule(**schedule), latents, torch.tensor, batch_size, bins)


# ----------------------------------------------------------------------------------------------------------------------
# Which evaluations


@pytest.mark.parametrize("num_timesteps", [1, 7, 64, 1000])
@pytest.mark.parametrize("num_images", [1, 3, 20, 45])
def test_each_bin_gets_evaluations_by_its_width(num_images: int, num_timesteps: int) -> None:
    model = Recorder()
    result = measured(model, normal(num_images, 1, 2, 2), num_train_timesteps=num_timesteps, steps_offset=0)
    widths = np.diff(result.edges)
    assert result.edges[0] == 0 and result.edges[-1] == num_timesteps
    assert len(widths) == min(10, num_timesteps) and widths.max() - widths.min() <= 1
    counts, _ = np.histogram(model.timesteps, bins=np.array(result.edges) - 0.5)
    evaluations = len(model.timesteps)
    assert counts.sum() == evaluations and counts.min() >= 8
    assert np.abs(counts - evaluations * widths / num_timesteps).max() < 1
    # Every image is evaluated equally often, at least four times, each time with other noise, over the whole schedule.
    repeats = evaluations // num_images
    assert repeats >= 4 and np.bincount(model.images).tolist() == [repeats] * num_images
    for image in range(num_images):
        places = sorted(t / num_timesteps for t, p in zip(model.timesteps, model.images, strict=True) if p == image)
        stretches = np.arange(repeats) / repeats
        assert all(stretches - 1 / num_timesteps < places) and all(places < stretches + 1 / repeats)


def test_few_images_are_evaluated_often_and_many_only_four_times() -> None:
    for num_images, evaluations in [(1, 80), (16, 80), (20, 80), (45, 180)]:
        model = Recorder()
        measured(model, normal(num_images, 1, 2, 2))
        assert len(model.timesteps) == evaluations


def test_bins_see_the_same_images_on_average() -> None:
    """Where images are sorted, the first ones must not be those with the lowest timesteps."""
    model = Recorder()
    measured(model, normal(100, 1, 2, 2))
    images, timesteps = np.array(model.images), np.array(model.timesteps)
    for low in range(0, 1000, 100):
        inside = images[(low <= timesteps) & (timesteps < low + 100)]
        assert len(inside) == 40 and 35 < inside.mean() < 65 and inside.min() < 15 and inside.max() > 84


def test_noise_and_timesteps_never_change() -> None:
    one, other = Recorder(), Recorder()
    latents = normal(3, 2, 4, 4)
    measured(one, latents)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    measured(other, latents)
    assert one.timesteps == other.timesteps and one.images == other.images
    assert torch.equal(torch.stack(one.noisy), torch.stack(other.noisy))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(noisy.flatten().tolist()) for noisy in one.noisy}) == len(one.noisy)


# ----------------------------------------------------------------------------------------------------------------------
# Values


def test_zero_model_on_constant_images() -> None:
    """Clean latents a and -3a in two channels, which are the target: loss 5 a^2, baseline 5 var(a), in each bin."""
    a = torch.tensor([0.5, -1.0, 2.0, 4.0, 0.0])
    latents = torch.stack([a, -3 * a], dim=1)[:, :, None, None].expand(-1, -1, 4, 4)
    model = Recorder()
    result = measured(model, latents, bins=4, prediction_type="sample")
    values = a.numpy().astype(float)[model.images]
    bin_of = np.array(model.timesteps) // 250
    for b in range(4):
        members = values[bin_of == b]
        assert result.loss[b] == pytest.approx(5 * (members**2).mean(), rel=1e-6)
        assert result.baseline[b] == pytest.approx(5 * members.var(), rel=1e-6)
    assert result.mean == pytest.approx(5 * (values**2).mean(), rel=1e-6)
    expected = sum(5 * values[bin_of == b].var() * (bin_of == b).sum() for b in range(4)) / len(values)
    assert result.baseline_mean == pytest.approx(expected, rel=1e-6)


def test_perfect_model_has_no_loss() -> None:
    latents, schedule = normal(3, 4, 8, 8), NoiseSchedule()

    def noise_of(noisy: Tensor, timesteps: Tensor, images: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (noisy - abar.sqrt() * latents[images]) / (1 - abar).sqrt()

    result = measured(Recorder(noise_of), latents)
    assert 0 <= max(result.loss) < 1e-9 and result.mean < 1e-9


def test_an_error_shows_in_its_own_bin() -> None:
    """An error of 2 from timestep 300 up to 599 only."""
    latents = normal(5, 4, 8, 8)

    def wrong_in_the_middle(noisy: Tensor, timesteps: Tensor, images: Tensor) -> Tensor:
        middle = ((300 <= timesteps) & (timesteps < 600)).float().view(-1, 1, 1, 1)
        return latents[images] + 2 * middle

    result = measured(Recorder(wrong_in_the_middle), latents, prediction_type="sample")
    assert result.loss == pytest.approx([0, 0, 0, 4, 4, 4, 0, 0, 0, 0], abs=1e-10)
    assert result.mean == pytest.approx(4 * 0.3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_baseline_of_noise(prediction_type: str) -> None:
    """Latents of variance 4 about 7: the noise has variance 1, and v that of alpha * noise - sigma * latents."""
    latents = 7 + 2 * normal(20, 4, 16, 16)
    model = Recorder()
    result = measured(model, latents, bins=50, prediction_type=prediction_type)
    abar = NoiseSchedule().alphas_cumprod.numpy()
    for b, baseline in enumerate(result.baseline):
        inside = np.array([t for t in model.timesteps if result.edges[b] <= t < result.edges[b + 1]])
        sigma = np.sqrt(1 - abar[inside])
        expected = 1.0 if prediction_type == "epsilon" else (abar[inside] + 4 * sigma**2).mean() + 49 * sigma.var()
        assert baseline == pytest.approx(expected, rel=0.05)
    # The loss of a model that returns zero includes the mean, too.
    mean = 0.0 if prediction_type == "epsilon" else 49 * (1 - abar).mean()
    assert result.mean == pytest.approx(result.baseline_mean + mean, rel=0.02)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_batches_do_not_matter(prediction_type: str) -> None:
    unet, context, latents = tiny_unet(), normal(3, 5, 16, seed=2), normal(3, 4, 8, 8)
    schedule = NoiseSchedule(prediction_type=prediction_type)
    one, other = (
        validation_loss(unet, schedule, latents, lambda indices: context[indices], batch_size, bins=4)
        for batch_size in (5, 100)
    )
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.mean == pytest.approx(other.mean, rel=1e-5)
    assert one.baseline == pytest.approx(other.baseline, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_names() -> None:
    result = BinnedLoss((0, 500, 1000), (1.0, 3.0), (4.0, 6.0), 2.0, 5.0)
    assert result.metrics("validation") == {
        **{"validation/loss": 2.0, "validation/loss_bin_00": 1.0, "validation/loss_bin_01": 3.0},
        **{"validation/baseline": 5.0, "validation/baseline_bin_00": 4.0, "validation/baseline_bin_01": 6.0},
    }
    # Alphabetical order is the order of the bins, however many there are.
    many = BinnedLoss(tuple(range(102)), (1.0,) * 101, (1.0,) * 101, 1.0, 1.0).metrics("validation")
    losses = [name for name in many if "loss" in name]
    assert losses == sorted(losses) and losses[1] == "validation/loss_bin_000" and len(losses) == 102


def test_gap_is_held_out_minus_training() -> None:
    train = BinnedLoss((0, 500, 1000), (1.0, 3.0), (4.0, 6.0), 2.0, 5.0)
    held_out = BinnedLoss((0, 500, 1000), (1.5, 2.75), (4.0, 6.0), 2.125, 5.0)
    assert gap_metrics(train, held_out) == {
        **{"validation/gap": 0.125, "validation/gap_bin_00": 0.5, "validation/gap_bin_01": -0.25},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.runs
def test_images_have_their_own_seeds() -> None:
    pipeline = tiny_pipeline()
    images = generate_validation_images(pipeline, PROMPTS, seed=11, shape=(16, 16), batch_size=2)
    for i, image in enumerate(images):
        alone = pipeline(PROMPTS[i], seed=11 + i, height=16, width=16, progress=False).images[0]
        assert difference(image, alone) <= 1
    assert difference(images[0], images[1]) > 5


def test_grey_images() -> None:
    pipeline = tiny_pipeline()
    pipeline.vae = tiny_vae(in_channels=1, out_channels=1)
    images = generate_validation_images(pipeline, PROMPTS, seed=0, shape=(16, 16), batch_size=8)
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 3


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def prompts(step: int, num_samples: int | None) -> str:
    config = UNetValidationConfig(every=100, sample_every=100, prompts=tuple("abcde"), num_samples=num_samples)
    return "".join(prompts_at(step, config))


def test_prompts_of_a_grid():
    """All grids show the same prompts, so that they compare; with too few images the prompts alternate."""
    assert prompts(100, None) == prompts(700, None) == "abcde"
    assert prompts(100, 12) == prompts(300, 12) == "abcdeabcdeab"
    assert prompts(100, 5) == prompts(200, 5) == "abcde"
    assert [prompts(step, 2) for step in (100, 200, 300, 400)] == ["ab", "cd", "ea", "bc"]
    assert [prompts(step, 1) for step in range(100, 700, 100)] == [*"abcdea"]
    assert prompts(250, 2) == prompts(300, 2)  # the end of a run, between two grids


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def measure_all(folder: Path, accelerator: Accelerator | None) -> None:
    """Everything that is shared over processes, with numbers of images that are not divisible by two."""
    shapes = []
    unet, context, latents = tiny_unet(), normal(9, 5, 16, seed=2), normal(9, 4, 8, 8)

    def model(noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        shapes.append(list(noisy.shape))
        return unet(noisy, timesteps, context)

    loss = validation_loss(model, NoiseSchedule(), latents, lambda indices: context[indices], 4, 5, accelerator)
    pipeline = tiny_pipeline()
    pipeline.defaults = GenerationDefaults(num_inference_steps=3)
    pipeline.unet.register_forward_hook(lambda module, inputs, output: shapes.append(list(output.shape)))
    images = generate_validation_images(pipeline, PROMPTS, 3, (16, 16), 8, accelerator)
    folder.mkdir(exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(loss.metrics("validation")))
    (folder / "shapes.json").write_text(json.dumps(shapes))
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")


@pytest.mark.runs
def test_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    """Two gloo processes: the same numbers and images on both as without any, from equally many and large calls."""
    run_on_two_processes(__file__, tmp_path)
    measure_all(tmp_path / "alone", None)

    def read(process: str, name: str) -> object:
        return json.loads((tmp_path / process / name).read_text())

    assert read("0", "figures.json") == read("1", "figures.json")
    assert read("0", "figures.json") == pytest.approx(read("alone", "figures.json"), rel=1e-5)
    assert len(read("0", "figures.json")) == 2 * 6
    # 45 evaluations: 23 a process; 3 images: 2 a process, whose 3 steps have the guided and unguided branch.
    assert read("0", "shapes.json") == read("1", "shapes.json")
    assert [shape[0] for shape in read("0", "shapes.json")] == [4] * 5 + [3] + [4] * 3
    for i in range(3):
        images = [Image.open(tmp_path / process / f"{i}.png") for process in ("0", "1", "alone")]
        assert difference(images[0], images[1]) == 0 and difference(images[0], images[2]) <= 1


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    measure_all(Path(folder) / str(accelerator.process_index), accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_as_command(lambda arguments: main(*arguments))

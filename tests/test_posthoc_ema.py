"""Averages of a length chosen after the training: profiles, tracking, snapshots, synthesis, `latentdiff ema`."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import TEXT_ENCODER, UNET, VAE, tiny_pipeline, tiny_vae
from torch import Tensor, nn

from latentdiff import AutoencoderKL, LatentDiffusionPipeline
from latentdiff.commands.cli import main
from latentdiff.config import Section, UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.data.captioned_images import open_images
from latentdiff.data.latent_cache import encode_means
from latentdiff.formats.files import read_safetensors
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.posthoc_ema import (
    PowerEMA,
    drop_snapshots_after,
    exponent_of_length,
    fit_profile,
    length_of_exponent,
    list_snapshots,
    plan_synthesis,
    power_decay,
    profile_products,
    save_snapshot,
    synthesis_weights,
    synthesise,
)
from latentdiff.training.unet_evaluation import validation_loss
from latentdiff.training.vae_evaluation import validate_vae

ROOT = Path(__file__).parent.parent
LENGTHS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.28)
TRACKED = (0.05, 0.10)


def density(time: float, gamma: float, taus: np.ndarray) -> np.ndarray:
    """The profile from its definition, tau^gamma over its numerical integral, through logarithms."""
    grid = (np.arange(200_000) + 0.5) / 200_000 * time
    log_norm = gamma * np.log(time) + np.log(np.exp(gamma * np.log(grid / time)).mean() * time)
    return np.where(taus <= time, np.exp(gamma * np.log(taus) - log_norm), 0.0)


def midpoints(time: float, count: int = 200_000) -> tuple[np.ndarray, float]:
    return (np.arange(count) + 0.5) / count * time, time / count


# --- profiles ---


@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_the_standard_deviation_of_the_profile(length):
    gamma = exponent_of_length(length)
    taus, width = midpoints(1.0)
    p = density(1.0, gamma, taus) * width
    mean = (p * taus).sum()
    assert np.sqrt((p * (taus - mean) ** 2).sum()) == pytest.approx(length, rel=1e-4)
    assert length_of_exponent(gamma) == pytest.approx(length, rel=1e-10)


def test_exponents_of_the_paper():
    """Karras et al. 2024, section 3.1: the two that EDM2 tracks."""
    assert exponent_of_length(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of_length(0.10) == pytest.approx(6.94, abs=0.005)
    assert length_of_exponent(0.0) == pytest.approx(12**-0.5)  # uniform


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_length_out_of_range(length):
    with pytest.raises(ValueError, match=r"EMA length .* must be greater than 0 and less than 0\.2887"):
        exponent_of_length(length)


@pytest.mark.parametrize(
    ("ta", "la", "tb", "lb"),
    [(500, 0.05, 500, 0.1), (300, 0.1, 800, 0.05), (800, 0.28, 700, 0.03), (640, 0.01, 650, 0.2)],
)
def test_products_are_the_integrals(ta, la, tb, lb):
    ga, gb = exponent_of_length(la), exponent_of_length(lb)
    taus, width = midpoints(min(ta, tb))
    expected = (density(ta, ga, taus) * density(tb, gb, taus)).sum() * width
    found = profile_products(*(np.float64(v) for v in (ta, ga, tb, gb)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found == profile_products(*(np.float64(v) for v in (tb, gb, ta, ga)))


def test_short_lengths_and_long_trainings_do_not_overflow():
    """gamma is 97.5, so that (10^7)^(2 gamma + 1) is 1e1372."""
    with np.errstate(all="raise", under="ignore"):
        gamma = exponent_of_length(0.01)
        steps = [n * 10**6 for n in range(1, 11) for _ in range(2)]
        fit = fit_profile(steps, [gamma, exponent_of_length(0.05)] * 10, 10**7, gamma)
    assert fit.weights == pytest.approx([0.0] * 18 + [1.0, 0.0], abs=1e-9)
    assert fit.error < 1e-6


def test_synthesis_weights_add_up_to_one_and_are_the_best():
    """Any other weights of sum 1 make a profile that is further away, measured by quadrature."""
    steps, gammas = [400, 400, 800, 800], [exponent_of_length(length) for length in TRACKED * 2]
    target = exponent_of_length(0.13)
    fit = fit_profile(steps, gammas, 800, target)
    assert synthesis_weights(steps, gammas, 800, target) == fit.weights
    assert sum(fit.weights) == pytest.approx(1.0, abs=1e-12)

    taus, width = midpoints(800.0)
    parts = np.stack([density(t, g, taus) for t, g in zip(steps, gammas, strict=True)])
    wanted = density(800, target, taus)

    def distance(weights: np.ndarray) -> float:
        return float(np.sqrt(((weights @ parts - wanted) ** 2).sum() * width / ((wanted**2).sum() * width)))

    best = distance(np.array(fit.weights))
    assert fit.error == pytest.approx(best, rel=1e-3)
    assert 0.01 < best < 0.2
    for i in range(4):
        for j in range(4):
            step = 1e-2 * (np.eye(4)[i] - np.eye(4)[j])
            assert i == j or distance(np.array(fit.weights) + step) > best


# --- tracking ---


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))


def train(steps: int, every: int, run: Path) -> tuple[PowerEMA, list[dict[str, Tensor]]]:
    """Noisy SGD on a random task with snapshots; returns the tracked averages and the weights after each step."""
    torch.manual_seed(0)
    model, teacher = tiny_model(), tiny_model().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracked, history = PowerEMA(model, TRACKED), []
    for step in range(steps):
        x = torch.randn(16, 8)
        loss = (model(x) - teacher(x) - 0.3 * torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracked.update(model, step)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if (step + 1) % every == 0:
            save_snapshot(run, step + 1, tracked.state())
    return tracked, history


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def directly(history: Sequence[Mapping[str, Tensor]], length: float) -> Tensor:
    """The average of the weights after steps 1 .. n, each with the integral of the profile over its step: float64."""
    gamma, n = exponent_of_length(length), len(history)
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    weights = torch.from_numpy(np.diff(edges))
    return weights @ torch.stack([flat(tensors) for tensors in history])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PowerEMA, list[dict[str, Tensor]]]:
    run = tmp_path_factory.mktemp("run")
    return run, *train(800, 100, run)


def test_after_the_first_step_the_average_is_the_weights():
    model = tiny_model()
    tracked = PowerEMA(model, TRACKED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    tracked.update(model, 0)
    for average in tracked.averages.values():
        assert all(torch.equal(average[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("length", [0.01, 0.05, 0.25])
def test_decays_make_the_profile(length):
    """The product form: step k has the weight (1 - beta_k) beta_(k+1) ... beta_n."""
    gamma, n = exponent_of_length(length), 40
    decays = [power_decay(step, gamma) for step in range(n)]
    weights = [(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(n)]
    taus, width = midpoints(n)
    expected = (density(n, gamma, taus) * width).reshape(n, -1).sum(axis=1)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)


def test_tracked_averages_are_the_sums(trained):
    _, tracked, history = trained
    for length, average in tracked.averages.items():
        torch.testing.assert_close(flat(average), directly(history, length), rtol=0, atol=1e-6)


def test_averages_are_float32_and_leave_out_frozen_parameters():
    model = tiny_model().to(torch.bfloat16)
    model[0].requires_grad_(False)
    tracked = PowerEMA(model, TRACKED)
    tracked.update(model, 0)
    tracked.update(model, 1)
    assert tracked.state().keys() == {f"{length}:2.{name}" for length in TRACKED for name in ("weight", "bias")}
    assert {tensor.dtype for tensor in tracked.state().values()} == {torch.float32}


def test_state_comes_back(trained):
    _, tracked, history = trained
    other = PowerEMA(tiny_model(), TRACKED)
    held = other.averages[0.05]["0.weight"]
    other.load({key: tensor.clone() for key, tensor in tracked.state().items()})
    assert all(torch.equal(tensor, tracked.state()[key]) for key, tensor in other.state().items())
    assert other.averages[0.05]["0.weight"] is held


def test_state_of_something_else_is_refused(trained):
    _, tracked, _ = trained
    state = tracked.state()
    with pytest.raises(ValueError, match=r"lengths \[0\.05, 0\.1\], but ema\.snapshot_lengths is \[0\.05, 0\.12\]"):
        PowerEMA(tiny_model(), (0.05, 0.12)).load(state)
    fewer = {key: tensor for key, tensor in state.items() if key != "0.05:0.bias"}
    with pytest.raises(ValueError, match=r"of another model: 0\.05:0\.bias"):
        PowerEMA(tiny_model(), TRACKED).load(fewer)
    with pytest.raises(ValueError, match=r"of another model: 0\.1:2\.bias"):
        PowerEMA(tiny_model(), TRACKED).load(state | {"0.1:2.bias": torch.zeros(5)})


# --- snapshots and synthesis ---


def test_snapshots_are_plain_files_of_the_averages(trained, tmp_path):
    run, tracked, _ = trained
    snapshots = list_snapshots(run)
    assert list(snapshots) == [100, 200, 300, 400, 500, 600, 700, 800]
    assert snapshots[800] == run / "ema_snapshots" / "step_00000800.safetensors"
    saved = read_safetensors(snapshots[800])
    assert all(torch.equal(tensor, saved[key]) for key, tensor in tracked.state().items())
    assert list_snapshots(tmp_path) == {}


def test_snapshots_after_a_resume_are_dropped(trained, tmp_path):
    _, tracked, _ = trained
    for step in (100, 200, 300):
        save_snapshot(tmp_path, step, tracked.state())
    drop_snapshots_after(tmp_path, 200)
    assert list(list_snapshots(tmp_path)) == [100, 200]


@pytest.mark.parametrize(
    ("length", "tolerance"), [(0.07, 0.01), (0.12, 0.01), (0.2, 0.05), (0.03, 0.15)], ids=lambda value: str(value)
)
@pytest.mark.filterwarnings("ignore:.*too few snapshots")
def test_synthesised_average_is_the_direct_one(trained, length, tolerance):
    """To a share of the distance between that average and the last weights, which is 0.3 to 1.5 % of the weights."""
    run, _, history = trained
    expected = directly(history, length)
    distance = (flat(history[-1]) - expected).norm()
    error = (flat(synthesise(run, length)) - expected).norm() / distance
    assert error < tolerance


@pytest.mark.parametrize("length", TRACKED)
def test_tracked_length_comes_back(trained, length):
    run, tracked, _ = trained
    torch.testing.assert_close(flat(synthesise(run, length)), flat(tracked.averages[length]), rtol=0, atol=1e-7)


def test_synthesis_at_an_earlier_step(trained):
    """Later snapshots have no part in it."""
    run, _, history = trained
    expected = directly(history[:400], 0.08)
    distance = (flat(history[399]) - expected).norm()
    assert (flat(synthesise(run, 0.08, 400)) - expected).norm() < 0.05 * distance


def test_misfit_is_told(trained):
    run, *_ = trained
    with pytest.warns(UserWarning, match=r"too few snapshots up to step 800 for EMA length 0\.02: .* 24\.5% off"):
        synthesise(run, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synthesise(run, 0.12)


def test_what_cannot_be_synthesised(trained, tmp_path):
    run, tracked, _ = trained
    with pytest.raises(ValueError, match="has no ema_snapshots/; set ema.snapshot_every and train again"):
        synthesise(tmp_path, 0.1)
    with pytest.raises(ValueError, match="no snapshot of step 350; there are 100, 200, 300"):
        synthesise(run, 0.1, 350)
    with pytest.raises(ValueError, match="EMA length 0.3"):
        synthesise(run, 0.3)

    save_snapshot(tmp_path, 100, tracked.state())
    second = save_snapshot(tmp_path, 200, PowerEMA(nn.Linear(2, 2), TRACKED).state())
    with pytest.raises(ValueError, match="are of different models"):
        synthesise(tmp_path, 0.1)
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step_00000200\.safetensors is truncated"):
        synthesise(tmp_path, 0.1)


# --- latentdiff ema ---

DATA = ["data.size=16", "data.limit=24", "data.holdout=4", "validation.batch_size=3", "logging.progress=false"]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(kind: type[Section], stage: str, run: Path, model: Mapping[str, object], *more: str) -> Section:
    """The demo's config for a tiny model, saved in the run's folder."""
    overrides = [*DATA, f"output.folder={run}", f"model={json.dumps(model)}", *more]
    config = load_config(kind, ROOT / "configs" / "demo" / f"{stage}.yaml", overrides)
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config


def walk(run: Path, model: nn.Module, steps: int = 8) -> PowerEMA:
    """Snapshots of a random walk of the model's weights, two apart."""
    tracked = PowerEMA(model, TRACKED)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        tracked.update(model, step)
        if step % 2 == 1:
            save_snapshot(run, step + 1, tracked.state())
    return tracked


def unet_run(run: Path, *overrides: str) -> tuple[UNetTrainingConfig, PowerEMA, Mapping[str, Tensor]]:
    """A finished run of stage 2; returns the text encoder's published weights too."""
    text = f"text.config={json.dumps(TEXT_ENCODER)}"
    config = configured(UNetTrainingConfig, "unet", run, UNET, text, *overrides)
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.save_pretrained(run)
    frozen = {name: p.clone() for name, p in pipeline.text_encoder.state_dict().items()}
    denoiser = TextConditionedUNet(pipeline.unet, pipeline.text_encoder if config.text.pretrained is None else None)
    return config, walk(run, denoiser.requires_grad_(True)), frozen


def loss_of(folder: Path, config: UNetTrainingConfig) -> float:
    """The validation loss of a written pipeline, by its own parts."""
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    _, held_out = open_images(config.data, 3, config.train.seed, progress=False)
    context = pipeline.encode_prompts(held_out.captions)
    latents = encode_means(pipeline.vae, held_out, 4)
    return validation_loss(pipeline.unet, pipeline.schedule, latents, lambda i: context[i], 4, 10).mean


@torch.no_grad()
def test_command_writes_the_pipeline_and_sweeps(tmp_path, capsys):
    run = tmp_path / "run"
    config, tracked, _ = unet_run(run)
    main(["ema", str(run), "--sweep", "0.05", "0.07", "0.1", "--length", "0.1", "--no-progress"])
    text = capsys.readouterr().out
    assert str(run / "ema-0.100") in text

    out = LatentDiffusionPipeline.from_pretrained(run / "ema-0.100")
    written = dict(TextConditionedUNet(out.unet, out.text_encoder).named_parameters())
    assert written.keys() == tracked.averages[0.1].keys()
    for name, tensor in tracked.averages[0.1].items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6)
    published = LatentDiffusionPipeline.from_pretrained(run)
    for name, tensor in published.vae.state_dict().items():
        assert torch.equal(tensor, out.vae.state_dict()[name])
    assert (out.schedule, out.defaults) == (published.schedule, published.defaults)
    assert json.loads((run / "ema-0.100" / "ema.json").read_text())["step"] == 8

    found = json.loads((run / "ema_sweep.json").read_text())
    losses = {row["length"]: row["loss"] for row in found["rows"]}
    assert list(losses) == [0.05, 0.07, 0.1] and found["step"] == 8
    assert losses[0.1] == pytest.approx(loss_of(run / "ema-0.100", config), rel=1e-5)
    assert found["published"] == pytest.approx(loss_of(run, config), rel=1e-5)
    assert losses[found["best"]] == min(losses.values())
    assert [line.split()[0] for line in text.splitlines() if "<- best" in line] == [f"{found['best']:g}"]
    assert abs(losses[0.1] - losses[0.05]) > 1e-4 * losses[0.1]  # the weights do matter

    image = tmp_path / "apple.png"
    main(["generate", str(run / "ema-0.100"), "red apple", "--steps", "2", "--out", str(image), "--no-progress"])
    assert image.is_file()


@torch.no_grad()
def test_frozen_text_encoder_stays(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    *_, frozen = unet_run(run, "text.pretrained=some/clip", "text.config=null")
    main(["ema", str(run), "--length", "0.05", "--step", "6", "--out", str(out), "--no-progress"])
    written = LatentDiffusionPipeline.from_pretrained(out)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in written.text_encoder.state_dict().items())
    expected = read_safetensors(list_snapshots(run)[6])
    for name, tensor in written.unet.named_parameters():
        torch.testing.assert_close(tensor, expected[f"0.05:unet.{name}"], rtol=0, atol=1e-6)
    assert not (run / "ema_sweep.json").exists()


@torch.no_grad()
def test_command_measures_the_latent_scale_anew(tmp_path):
    """Of a stage 1 run, whose own final autoencoder has another scale folded in."""
    run = tmp_path / "run"
    config = configured(VAETrainingConfig, "vae", run, VAE)
    raw = tiny_vae(scaling_factor=1.0)
    tracked = walk(run, raw)
    tiny_vae(seed=3).save_pretrained(run)
    main(["ema", str(run), "--length", "0.1", "--sweep", "0.1", "--no-progress"])

    for name, parameter in raw.named_parameters():
        parameter.copy_(tracked.averages[0.1][name])
    written = AutoencoderKL.from_pretrained(run / "ema-0.100")
    images, held_out = open_images(config.data, 3, config.train.seed, progress=False)
    pixels = held_out.first(4)
    torch.testing.assert_close(written(pixels)[0], raw(pixels)[0], rtol=0, atol=1e-4)
    moments = torch.cat([written.encode(pixels) for _, pixels in images.batches(5)])
    draws = torch.cat([written.sample(moments, torch.randn(moments[:, :4].shape)) for _ in range(50)])
    assert draws.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (draws.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert not torch.allclose(raw.encode(pixels), written.encode(pixels), atol=0.1)

    found = json.loads((run / "ema_sweep.json").read_text())
    assert found["measure"] == "held-out MSE"
    assert found["rows"][0]["loss"] == pytest.approx(validate_vae(raw, held_out, 4)["mse"], rel=1e-4)
    assert found["published"] == pytest.approx(validate_vae(tiny_vae(seed=3), held_out, 4)["mse"], rel=1e-4)


def test_default_sweep_of_an_unfinished_stage_1(tmp_path, capsys):
    run = tmp_path / "run"
    configured(VAETrainingConfig, "vae", run, VAE)
    walk(run, tiny_vae())
    main(["ema", str(run), "--sweep", "--no-progress"])
    found = json.loads((run / "ema_sweep.json").read_text())
    assert [row["length"] for row in found["rows"]] == [0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25]
    assert found["published"] is None and "published" not in capsys.readouterr().out
    errors = {row["length"]: row["profile_error"] for row in found["rows"]}
    assert errors[0.1] < 1e-6 < errors[0.063] < errors[0.01]
    assert errors[0.25] == pytest.approx(plan_synthesis(run, 0.25).error)
    assert not list(run.glob("ema-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --length to write a model, --sweep to compare lengths, or both"),
        (["--sweep", "0.1", "--out", "x"], "takes --length"),
        (["--length", "0.1"], "has no ema_snapshots/; set ema.snapshot_every and train again"),
        (["--length", "0.5"], "EMA length 0.5 must be greater than 0 and less than 0.2887"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["ema", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_wrong_folders_are_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    configured(VAETrainingConfig, "vae", run, VAE, "data.holdout=0")
    walk(run, tiny_vae())
    for arguments, message in [
        (["--sweep", "0.1"], "data.holdout is 0"),
        (["--length", "0.1", "--out", str(run)], "is the run itself"),
        (["--length", "0.1", "--device", "nowhere"], "--device nowhere"),
    ]:
        with pytest.raises(SystemExit):
            main(["ema", str(run), *arguments, "--no-progress"])
        assert message in capsys.readouterr().err
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        main(["ema", str(run), "--length", "0.1"])
    assert "it has no config.yaml" in capsys.readouterr().err

"""`latentdiff ema`: the models and figures it writes, for runs of both stages."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from scripts import EMBEDDED, WHOLE
from tiny import TEXT_ENCODER, UNET, VAE, tiny_pipeline, tiny_vae
from torch import Tensor, nn

from latentdiff import AutoencoderKL, LatentDiffusionPipeline
from latentdiff.commands.cli import main
from latentdiff.config import Section, UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.data.captioned_images import open_images
from latentdiff.data.latent_cache import encode_means
from latentdiff.formats.files import read_safetensors
from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.posthoc_ema import PowerEMA, list_snapshots, plan_synthesis, save_snapshot
from latentdiff.training.unet_evaluation import validation_loss
from latentdiff.training.vae_evaluation import validate_vae

ROOT = Path(__file__).parents[2]
TRACKED = (0.05, 0.10)

DATA = [
    *EMBEDDED,
    "data.size=16",
    "data.limit=24",
    "data.holdout=4",
    "validation.batch_size=3",
    "logging.progress=false",
]


def configured(kind: type[Section], stage: str, run: Path, model: Mapping[str, object], *more: str) -> Section:
    """The demo's config for a tiny model, saved in the run's folder."""
    overrides = [
        *DATA,
        *EMBEDDED,
        *(WHOLE if stage == "vae" else ()),
        f"output.folder={run}",
        f"model={json.dumps(model)}",
        *more,
    ]
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
    """A finished run of stage 2; returns also the weights of its text encoder."""
    text = f"text.config={json.dumps(TEXT_ENCODER)}"
    config = configured(UNetTrainingConfig, "unet", run, UNET, text, *overrides)
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.save_pretrained(run)
    frozen = {name: p.clone() for name, p in pipeline.text_encoder.state_dict().items()}
    model = TextConditionedUNet(pipeline.unet, pipeline.text_encoder if config.text.pretrained is None else None)
    return config, walk(run, model.requires_grad_(True)), frozen


def loss_of(folder: Path, config: UNetTrainingConfig) -> float:
    """The validation loss of a written pipeline, by its own parts."""
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    _, held_out = open_images(config.data, 3, config.train.seed, progress=False)
    context = pipeline.encode_prompts(held_out.captions)
    latents = encode_means(pipeline.vae, held_out, 4)
    return validation_loss(pipeline.unet, pipeline.schedule, latents, lambda i: context[i], 4, 10).mean


@pytest.mark.runs
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
    own = LatentDiffusionPipeline.from_pretrained(run)
    for name, tensor in own.vae.state_dict().items():
        assert torch.equal(tensor, out.vae.state_dict()[name])
    assert (out.schedule, out.defaults) == (own.schedule, own.defaults)
    assert json.loads((run / "ema-0.100" / "ema.json").read_text())["step"] == 8

    found = json.loads((run / "ema_sweep.json").read_text())
    losses = {row["length"]: row["loss"] for row in found["rows"]}
    assert list(losses) == [0.05, 0.07, 0.1] and found["step"] == 8
    assert losses[0.1] == pytest.approx(loss_of(run / "ema-0.100", config), rel=1e-5)
    assert found["final"] == pytest.approx(loss_of(run, config), rel=1e-5)
    assert losses[found["best"]] == min(losses.values())
    assert [line.split()[0] for line in text.splitlines() if "<- best" in line] == [f"{found['best']:g}"]
    assert abs(losses[0.1] - losses[0.05]) > 1e-4 * losses[0.1]  # the weights do matter

    image = tmp_path / "apple.png"
    main(
        [
            "generate",
            str(run / "ema-0.100"),
            "red apple",
            "--num-inference-steps",
            "2",
            "--out",
            str(image),
            "--no-progress",
        ]
    )
    assert image.is_file()


@pytest.mark.runs
@torch.no_grad()
def test_frozen_text_encoder_is_kept(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    *_, frozen = unet_run(run, "text.pretrained=some/clip", "text.config=null", "text.token_std=null")
    main(["ema", str(run), "--length", "0.05", "--step", "6", "--out", str(out), "--no-progress"])
    written = LatentDiffusionPipeline.from_pretrained(out)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in written.text_encoder.state_dict().items())
    expected = read_safetensors(list_snapshots(run)[6])
    for name, tensor in written.unet.named_parameters():
        torch.testing.assert_close(tensor, expected[f"0.05:unet.{name}"], rtol=0, atol=1e-6)
    assert not (run / "ema_sweep.json").exists()


@pytest.mark.runs
@torch.no_grad()
def test_command_measures_the_latent_scale_again(tmp_path):
    """In a stage 1 run, whose final autoencoder has another scale folded in."""
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
    assert found["final"] == pytest.approx(validate_vae(tiny_vae(seed=3), held_out, 4)["mse"], rel=1e-4)


def test_default_sweep_of_an_unfinished_stage_1(tmp_path, capsys):
    run = tmp_path / "run"
    configured(VAETrainingConfig, "vae", run, VAE)
    walk(run, tiny_vae())
    main(["ema", str(run), "--sweep", "--no-progress"])
    found = json.loads((run / "ema_sweep.json").read_text())
    assert [row["length"] for row in found["rows"]] == [0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25]
    assert found["final"] is None and "final" not in capsys.readouterr().out
    errors = {row["length"]: row["profile_error"] for row in found["rows"]}
    assert errors[0.1] < 1e-6 < errors[0.063] < errors[0.01]
    assert errors[0.25] == pytest.approx(plan_synthesis(run, 0.25).error)
    assert not list(run.glob("ema-*"))


@pytest.mark.runs
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


@pytest.mark.runs
def test_wrong_folders_are_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    configured(VAETrainingConfig, "vae", run, VAE, "data.holdout=0")
    walk(run, tiny_vae())
    for arguments, message in [
        (["--sweep", "0.1"], "data.holdout is 0"),
        (["--length", "0.1", "--out", str(run)], f"--out {run} is the folder of a training run"),
        (["--length", "0.1", "--device", "nowhere"], "--device nowhere"),
    ]:
        with pytest.raises(SystemExit):
            main(["ema", str(run), *arguments, "--no-progress"])
        assert message in capsys.readouterr().err
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        main(["ema", str(run), "--length", "0.1"])
    assert "it has no config.yaml" in capsys.readouterr().err

"""`latentdiff evaluate-vae`: its report in words and files, and how stage 2 uses it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import refusal
from PIL import Image
from scripts import EMBEDDED, WHOLE
from tiny import tiny_pipeline, tiny_vae

from latentdiff.commands.cli import main
from latentdiff.commands.evaluate_vae import Limits, Metric
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.evaluation.autoencoder import EXTRA_METRICS, Thresholds, VAEReport, evaluate_run, refuse_unfit
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.pipeline.preview import LatentPreview

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"


def test_the_command_line_has_the_same_defaults():
    assert asdict(Limits()) == asdict(Thresholds())
    assert {metric.value for metric in Metric} == set(EXTRA_METRICS)


def write_run(folder: Path, vae: AutoencoderKL, *overrides: str) -> Path:
    """What stage 1 leaves: the autoencoder and its config."""
    data = ["data.size=16", "data.limit=24", "data.holdout=4", "model.sample_size=16", *EMBEDDED, *WHOLE, *overrides]
    vae.save_pretrained(folder)
    (folder / "config.yaml").write_text(to_yaml(load_config(VAETrainingConfig, CONFIGS / "vae.yaml", data)))
    return folder


LENIENT = ["--min-psnr", "0", "--min-ssim", "-1", "--max-scale-error", "99", "--max-noise-loss", "99"]


def test_the_command_writes_a_report_that_stage_2_checks(tmp_path, capsys):
    run, log = write_run(tmp_path / "run", tiny_vae()), tmp_path / "LOG.md"
    refuse_unfit(run, accept=False)  # no report: nothing is refused
    main(["evaluate-vae", str(run), "--no-progress", "--device", "cpu", "--batch-size", "3", "--log", str(log)])
    printed = capsys.readouterr().out
    assert "Measured on the 4 held-out images of 'embedded', 16 px." in printed
    assert "Verdict: UNFIT for stage 2, " in printed and "FAILED: PSNR is " in printed
    assert log.read_text().startswith("\n## 20") and "Verdict: UNFIT" in log.read_text()
    names = {"vae_report.json", "vae_report.png", "latent_preview.json"}
    assert all(str(run / name) in printed for name in names)
    assert {path.name for path in run.iterdir()} == names | {
        "config.json",
        "config.yaml",
        "diffusion_pytorch_model.safetensors",
    }
    with Image.open(run / "vae_report.png") as table:
        assert table.height > 3 * 128 and table.width > 3 * 128
    assert LatentPreview.load(run).weights.shape == (3, 4)

    # The file holds the same report, exactly.
    values = json.loads((run / "vae_report.json").read_text())
    result = evaluate_run(run, Thresholds(), batch_size=3, device="cpu", progress=False)
    assert VAEReport(**values["report"]) == result.report
    assert Thresholds(**values["thresholds"]) == Thresholds()
    assert [check["passed"] for check in values["checks"]] == [check.passed for check in result.checks]
    assert values["fit"] is result.fit is False

    with pytest.raises(ValueError, match=r"vae_report\.json: the autoencoder is unfit for stage 2: PSNR is ") as error:
        refuse_unfit(run, accept=False)
    assert "allow_unfit_vae=true" in str(error.value) and "\n" not in str(error.value)
    refuse_unfit(run, accept=True)
    tiny_vae(seed=1).save_pretrained(run)  # other weights: the report is not theirs
    refuse_unfit(run, accept=False)
    tiny_vae().save_pretrained(run)  # the same ones again
    with pytest.raises(ValueError, match="unfit"):
        refuse_unfit(run, accept=False)

    main(["evaluate-vae", str(run), "--no-progress", "--split", "training", "--max-dead-channels", "1", *LENIENT])
    printed = capsys.readouterr().out
    assert "Measured on the 20 training images of 'embedded', 16 px." in printed
    assert "Verdict: fit for stage 2." in printed and "FAILED" not in printed
    refuse_unfit(run, accept=False)
    (run / "vae_report.json").write_text(json.dumps({"weights_sha256": values["weights_sha256"], "checks": [1]}))
    with pytest.raises(ValueError, match="is not a report of latentdiff evaluate-vae"):
        refuse_unfit(run, accept=False)


def test_without_held_out_images_it_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_vae(in_channels=1, out_channels=1), "data.holdout=0")
    main(["evaluate-vae", str(run), "--no-progress"])
    assert "the 24 training images of 'embedded' (none are held out), 16 px" in capsys.readouterr().out
    assert not (run / "latent_preview.json").exists()  # grey images have no such map
    assert (run / "vae_report.png").is_file()
    error = refusal(capsys, "evaluate-vae", str(run), "--no-progress", "--split", "held-out")
    assert "has no held-out images" in error and error.count("\n") == 1


def test_in_a_pipeline_folder_it_measures_the_autoencoder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    data = ["data.size=16", "data.limit=24", "data.holdout=4", "model.sample_size=8", f"vae={tmp_path}"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(UNetTrainingConfig, CONFIGS / "unet.yaml", data)))
    result = evaluate_run(tmp_path, Thresholds(), device="cpu", progress=False)
    assert result.files[0] == tmp_path / "vae" / "vae_report.json" and all(path.is_file() for path in result.files)
    assert "4 held-out" in result.data and not (tmp_path / "vae_report.json").exists()
    for folder in (tmp_path, tmp_path / "vae"):
        with pytest.raises(ValueError, match="unfit for stage 2"):
            refuse_unfit(folder, accept=False)


def test_the_command_refuses(tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_vae())
    bare = tmp_path / "bare"
    tiny_vae().save_pretrained(bare)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "nowhere' does not exist; train one with `latentdiff train-vae`, or give"),
        ([str(bare)], "bare has no config.yaml, which says what the images are; give --config"),
        ([str(tmp_path)], "config.json does not exist"),
        ([str(run), "--config", str(tmp_path / "other.yaml")], "other.yaml does not exist; give --config"),
        ([str(run), "--device", "nothing"], "--device nothing: "),
        ([str(run), "--max-dead-channels", "2"], "max_dead_channels is 2, a fraction"),
        ([str(run), "--min-psnr", "nan"], "min_psnr is nan"),
    ]:
        error = refusal(capsys, "evaluate-vae", *arguments, "--no-progress")
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before
    assert "--batch-size" in refusal(capsys, "evaluate-vae", str(run), "--batch-size", "0")

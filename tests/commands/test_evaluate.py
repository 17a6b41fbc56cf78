"""`latentdiff evaluate`: folders that are no runs of stage 2, held-out pairs of style and object, checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal
from PIL import Image
from scripts import run_unet
from tiny import tiny_pipeline

from latentdiff.commands.cli import main


def test_evaluate_refuses_a_folder_that_is_no_run(capsys, tmp_path):
    error = refusal(capsys, "evaluate", str(tmp_path / "nowhere"))
    assert error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1
    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    error = refusal(capsys, "evaluate", str(folder))  # a pipeline, but without the config that it was trained with
    assert error == f"error: config {folder}/config.yaml does not exist\n"


@pytest.fixture(scope="module")
def style_run(tmp_path_factory: pytest.TempPathFactory, vae_run: Path) -> Path:
    """A run of three steps on two styles of five objects, with two pairs held out; checkpoints after 2 and 3."""
    data, noise = tmp_path_factory.mktemp("styles"), np.random.default_rng(0)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for style in ("noto", "blob"):
        for label in ("apple", "bus", "cat", "door", "egg"):
            split = "validation" if (style, label) in (("noto", "bus"), ("blob", "egg")) else "train"
            row = {"file_name": f"{style}/{label}.png", "text": f"{style} style, {label}", "style": style}
            splits[split].append(row | {"label": label})
            (data / split / style).mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(data / split / row["file_name"])
    for split, rows in splits.items():
        (data / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["validation_split=validation", "holdout=0", "limit=null"]
    return run_unet(
        tmp_path_factory.mktemp("style_run") / "run",
        vae_run,
        f"data.source={data}",
        *(f"data.{option}" for option in options),
        *("train.steps=3", "train.batch_size=4", "output.checkpoint_every=2", "output.publish=last"),
    )


@pytest.mark.runs
def test_evaluate_held_out_pairs(capsys, style_run):
    main(["evaluate", str(style_run), "--device", "cpu", "--no-progress"])
    output = capsys.readouterr().out
    assert "|  | pair | style | object | copies | PSNR to the truth (dB) |" in output
    assert "\nNearest of 10 true images; 3 steps, guidance 2.0, float32.\n" in output
    figures = json.loads((style_run / "evaluation.json").read_text(encoding="utf-8"))
    assert (figures["training_images"], figures["held_out_images"], figures["prompts"]) == (8, 2, 2)
    assert figures["styles"]["floor: best copies"]["object"] == {"hits": 2, "total": 2}
    assert (style_run / "evaluation.png").is_file()


@pytest.mark.runs
def test_evaluate_checkpoints(capsys, style_run, tmp_path):
    """The weights of the last checkpoint are those of the model, which is published after the last step."""
    log = tmp_path / "log.md"
    main(["evaluate", str(style_run), "--checkpoints", "--device", "cpu", "--no-progress", "--log", str(log)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| samples seen | step | pair | style | object | copies | ")
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| 8", "2"], ["| 12", "3"]]
    assert lines[0] in log.read_text(encoding="utf-8")
    assert "Averaged weights; 3 steps, guidance 2.0, float32." in lines
    written = json.loads((style_run / "evaluation_curve.json").read_text(encoding="utf-8"))
    assert written["dtype"] == "float32"
    curve = written["checkpoints"]
    assert [(point["step"], point["samples_seen"]) for point in curve] == [(2, 8), (3, 12)]
    assert {path.name for path in (style_run / "evaluation").iterdir()} == {"step_00000002.png", "step_00000003.png"}
    main(["evaluate", str(style_run), "--device", "cpu", "--no-progress"])
    published = json.loads((style_run / "evaluation.json").read_text(encoding="utf-8"))
    assert published["styles"] == curve[-1]["styles"]


@pytest.mark.runs
def test_evaluate_in_bfloat16(capsys, style_run):
    """Sampling is another; the autoencoder is measured in float32 all the same."""
    figures = {}
    for dtype in ("float32", "bfloat16"):
        main(["evaluate", str(style_run), "--dtype", dtype, "--device", "cpu", "--no-progress"])
        assert f"guidance 2.0, {dtype}.\n" in capsys.readouterr().out
        figures[dtype] = json.loads((style_run / "evaluation.json").read_text(encoding="utf-8"))
    own = [figures[dtype]["styles"]["held-out prompts"]["psnr"] for dtype in figures]
    assert own[0] != own[1] and own[0] == pytest.approx(own[1], abs=0.2)
    assert figures["float32"]["training_psnr"] == figures["bfloat16"]["training_psnr"]


@pytest.mark.runs
def test_evaluate_checkpoints_needs_some(capsys, style_run, tmp_path):
    (tmp_path / "config.yaml").write_text((style_run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    error = refusal(capsys, "evaluate", str(tmp_path), "--checkpoints", "--device", "cpu")
    assert error == f"error: {tmp_path} has no checkpoints\n"

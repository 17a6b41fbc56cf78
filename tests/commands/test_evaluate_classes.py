"""`latentdiff evaluate-classes`: its figures, its grid, its classifier file, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from image_sets import COLOURS, coloured, coloured_arrays, png_rows
from PIL import Image

from latentdiff.commands.cli import main
from latentdiff.evaluation.classes import train_classifier


def write_parquet(path: Path, names: Sequence[str], per_class: int, seed: int) -> None:
    """Images with class labels, as datasets on the hub have them."""
    arrays, captions = coloured_arrays(names, per_class, seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    table = datasets.Dataset.from_dict({"image": png_rows(arrays), "label": captions}, features=features)
    table.to_parquet(path)


@pytest.fixture
def class_run(unet_run: Path, tmp_path: Path) -> Path:
    """A run whose data are images of three classes, on which its pipeline was not trained."""
    run = tmp_path / "run"
    shutil.copytree(unet_run, run)
    data = tmp_path / "data"
    data.mkdir()
    for split, count, seed in [("train", 8, 0), ("test", 5, 1)]:
        write_parquet(data / f"{split}.parquet", list(COLOURS), count, seed)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": str(data), "validation_split": "test", "caption_column": "label", "limit": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def evaluate(run: Path, *options: str) -> None:
    """The command, with few steps of everything."""
    common = [
        "--no-progress",
        "--device",
        "cpu",
        "--num-inference-steps",
        "2",
        "--per-class",
        "3",
        "--classifier-steps",
        "20",
    ]
    main(["evaluate-classes", str(run), *common, *options])


@pytest.mark.runs
def test_command_writes_figures_and_a_grid(class_run, tmp_path, capsys):
    file, log = tmp_path / "classifier.safetensors", tmp_path / "LOG.md"
    common = ["--classifier", str(file), "--sampler", "euler", "--guidance-scale", "1.5", "--seed", "4"]
    evaluate(class_run, *common, "--log", str(log))
    output = capsys.readouterr().out
    figures = json.loads((class_run / "class_fidelity.json").read_text())
    assert figures["generated_images"] == 9 and figures["held_out_images"] == 15
    assert figures["accuracy_real"] == 1 and figures["accuracy"] < 1
    assert list(figures["classes"]) == ["blue", "green", "red"]
    assert np.mean([one["generated"] for one in figures["classes"].values()]) == pytest.approx(
        figures["accuracy"], abs=1e-3
    )
    kid, floor = figures["kid_classifier_features"], figures["kid_classifier_features_floor"]
    assert kid["mean"] > floor["mean"]
    assert (figures["num_inference_steps"], figures["sampler"]) == (2, "euler")
    assert (figures["guidance_scale"], figures["seed"]) == (1.5, 4)
    with Image.open(class_run / "class_fidelity.png") as grid:
        assert grid.mode == "RGB" and grid.width > 3 * 64 and grid.height > 3 * 64
    assert f"| 9 generated | {figures['accuracy']:.1%} | {kid['mean']:.4g} ± {kid['std']:.2g} |" in output
    assert "KID (classifier features)" in output and "FID" not in output
    report = output[: output.index(f"\n\n{class_run}")]
    assert report in log.read_text() and "latentdiff evaluate-classes" in log.read_text()

    # Again with the written classifier: the same figures for any number of training steps.
    written = file.read_bytes()
    evaluate(class_run, *common, "--classifier-steps", "1")
    assert json.loads((class_run / "class_fidelity.json").read_text()) == figures
    assert file.read_bytes() == written
    evaluate(class_run, *common, "--held-out-limit", "6")
    assert json.loads((class_run / "class_fidelity.json").read_text())["held_out_images"] == 6


@pytest.mark.runs
def test_command_refuses(class_run, unet_run, tmp_path, capsys):
    def refusal(run: Path, *options: str) -> str:
        with pytest.raises(SystemExit) as end:
            evaluate(run, *options)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    for option in ("--per-class", "--batch-size", "--classifier-steps"):
        assert f"Invalid value for '{option}'" in refusal(class_run, option, "0")
    assert "Invalid value for '--held-out-limit'" in refusal(class_run, "--held-out-limit", "1")
    file = tmp_path / "classifier.safetensors"
    assert "unknown sampler 'eule'" in refusal(class_run, "--sampler", "eule", "--classifier", str(file))
    assert not file.exists()  # refused before it was trained
    train_classifier(coloured(), steps=1, progress=False).save(file)
    message = f"error: --classifier {file} knows 2 classes, the images have 3; only in one of the two: blue\n"
    assert refusal(class_run, "--classifier", str(file)) == message
    message = "error: 'embedded' has 20 different caption(s) for 20 images: they are descriptions"
    assert refusal(unet_run).startswith(message)  # every image has a caption of its own

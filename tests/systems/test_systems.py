"""configs/systems: every recipe, its small form and the tutorial's recipe train with the same script and generate."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from scripts import ROOT, metrics

import train_unet
from latentdiff import LatentDiffusionPipeline, UNet
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.models.pixel_space import PixelSpace
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.training.arguments import parse_arguments
from tools.build_fashion_mnist import LABELS

SYSTEMS = ROOT / "configs" / "systems"
PIXELS = ["classes-16", "fashion-28", "fashion-32", "images-64"]
FORMS = [("small",), ("small", "tutorial"), ("tutorial",)]


def test_all_systems_are_tested():
    assert sorted(path.name for path in SYSTEMS.iterdir()) == sorted([*PIXELS, "pokemon-512"])
    for name in PIXELS:
        assert {path.name for path in (SYSTEMS / name).iterdir()} == {"unet.yaml", "small.args", "tutorial.args"}


def command(name: str, form: tuple[str, ...], *overrides: str) -> list[str]:
    files = [f"@{SYSTEMS / name / f'{part}.args'}" for part in form]
    return [str(SYSTEMS / name / "unet.yaml"), *files, *overrides]


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("form", [(), *FORMS])
def test_every_form_is_a_valid_config_of_a_network_that_can_be_built(name, form):
    parsed = parse_arguments(command(name, form), "unet")
    config = load_config(UNetTrainingConfig, parsed.config, parsed.overrides)
    assert config.vae is None and config.model.in_channels == (3 if name == "images-64" else 1)
    with torch.device("meta"):
        UNet(config.model)
    tokenizer = CLIPTokenizer.load()
    words = [sum(map(len, tokenizer.words(prompt))) for prompt in config.validation.prompts]
    assert max(words) + 2 <= config.text.config["max_position_embeddings"]  # start and end
    assert config.output.folder == f"saved/{name}" + (f"-{form[-1]}" if form else "")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty grey images with Fashion-MNIST's columns and class names, in both splits."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))})
    for split in ("train", "test"):
        images = [Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(20)]
        table = {"image": images, "label": [i % 10 for i in range(20)]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "form"), [*((name, ("small",)) for name in PIXELS), ("classes-16", ("small", "tutorial"))]
)
def test_the_small_form_trains_and_generates(name, form, fashion, tmp_path):
    quick = ["train.steps=2", "train.batch_size=4", "validation.every=2", "validation.sample_every=2"]
    quick += [
        "validation.num_samples=2",
        "validation.num_inference_steps=2",
        "validation.max_images=2",
        "validation.bins=2",
    ]
    quick += ["logging.every=1", "logging.progress=false", "output.checkpoint_every=2", "data.limit=null"]
    quick += [f"output.folder={tmp_path}", "validation.batch_size=2"]
    source = ["data.limit=8", "data.holdout=2"] if name == "images-64" else [f"data.source={fashion}"]
    AcceleratorState._reset_state(reset_partial_state=True)
    train_unet.main(command(name, form, *quick, *source))
    losses = metrics(tmp_path, "loss")
    assert sorted(losses) == [1, 2] and all(np.isfinite(loss) for loss in losses.values())
    assert sorted(metrics(tmp_path, "validation/loss")) == [0, 2]

    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.vae, PixelSpace)
    size = int(name.split("-")[1])
    with Image.open(tmp_path / "samples" / "step_00000002.png") as grid:
        assert grid.size == (2 * size + 2, size)
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    tutorial = "tutorial" in form
    linear = tutorial or name == "images-64"
    assert scheduler["beta_schedule"] == ("linear" if linear else "squaredcos_cap_v2")
    assert scheduler["prediction_type"] == ("epsilon" if tutorial else "v_prediction")
    steps = {"classes-16": 150, "fashion-28": 200, "fashion-32": 500, "images-64": 1000}[name]
    assert scheduler["num_train_timesteps"] == steps and scheduler["clip_sample"]

"""Random edits of configs and of model folders: accepted, or refused in one line each, at once and in little memory."""

import contextlib
import copy
import datetime
import json
import math
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scripts import ROOT
from tiny import tiny_pipeline

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet
from latentdiff.pipeline import LatentDiffusionPipeline

SECONDS, MEBIBYTES = 2.0, 1024.0  # of CPU time
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 1000, 2**31, 2**63, 10**40),
    *(0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "a", "null", "1e-3", "../..", "/dev/zero", "\x1b[31m\u202e\n", "x" * 5000),
    *([], {}, [[]], [0], [1.5, "a", None], [8, 16] * 50, [16] * 10**4, {"a": {"b": 1}}, {"_class_name": []}),
]
NOT_IN_JSON: list[Any] = [datetime.date(2026, 1, 1), b"bytes"]


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a value made of dicts and lists."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else []
    for key in keys:
        yield values, key
        yield from places(values[key])


def edited(values: dict[str, Any], rng: random.Random, extra: list[Any] = NOT_IN_JSON) -> dict[str, Any]:
    """A copy with one to three random edits: a value replaced, scaled or wrapped, a key removed, renamed or added."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(values)) or [({"a": 1}, "a")])
        value = container[key]
        edit = rng.choice(["replace", "replace", "replace", "scale", "wrap", "remove", "rename", "add"])
        if edit == "replace":
            container[key] = copy.deepcopy(rng.choice([*VALUES, *extra]))
        elif edit == "scale" and isinstance(value, int | float):
            container[key] = value * rng.choice([-1, 0, 2, 3, 10**6, 0.5])
        elif edit == "wrap":
            container[key] = rng.choice([[value], {"a": value}, [value] * 3])
        elif edit == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(["", "a", "model", "learning_rate", "\x1b[31m", key + "s"])] = copy.deepcopy(value)
            if edit == "rename":
                del container[key]
    return values


def peak() -> float:
    """The most memory this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_random_edits_of_configs(stage: str, tmp_path: Path) -> None:
    """500 of each stage's config, and the networks of those that are accepted."""
    kind, network = (VAETrainingConfig, AutoencoderKL) if stage == "vae" else (UNetTrainingConfig, UNet)
    original = yaml.safe_load((ROOT / "configs" / "reference" / f"{stage}.yaml").read_text())
    path, accepted, before = tmp_path / "config.yaml", 0, peak()
    for seed in range(500):
        path.write_text(yaml.safe_dump(edited(original, random.Random(seed))))
        start = time.process_time()
        try:
            config = load_config(kind, path)
            with torch.device("meta"):
                network(config.model)
            accepted += 1
        except ValueError as error:
            lines = str(error).split("\n")
            assert all(0 < len(line) < 500 and line.isprintable() for line in lines), (seed, lines)
        assert time.process_time() - start < SECONDS, seed
    assert 10 < accepted < 300 and peak() - before < MEBIBYTES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "saved"
    tiny_pipeline().save_pretrained(folder)
    return folder


def damage(folder: Path, rng: random.Random) -> str:
    """Edit a JSON file of a model's folder, or damage any file; what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    configs = [path for path in files if path.suffix == ".json" and path.parent.name != "tokenizer"]
    path = rng.choice(configs if configs and rng.random() < 0.6 else files)
    data = path.read_bytes()
    edit = rng.choice(["json"] * 6 + ["remove", "cut", "bytes", "empty", "folder", "header"])
    with contextlib.suppress(ValueError):  # it was damaged before
        if edit == "json" and path.suffix == ".json" and path.name != "vocab.json":
            path.write_text(json.dumps(edited(json.loads(data), rng, [])))
            return f"{edit} {path.relative_to(folder)}"
        if edit == "header" and path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(edited(json.loads(data[8 : 8 + length]), rng, [])).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
            return f"{edit} {path.relative_to(folder)}"
    if edit in ("cut", "json", "header"):
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif edit == "empty":
        path.write_bytes(b"")
    elif edit == "bytes":
        where = rng.randrange(len(data) + 1)
        path.write_bytes(data[:where] + rng.randbytes(8) + data[where + 8 :])
    else:
        path.unlink()
        if edit == "folder":
            path.mkdir()
    return f"{edit} {path.relative_to(folder)}"


@pytest.mark.slow
def test_random_edits_of_model_folders(saved: Path, tmp_path: Path) -> None:
    """500 folders with one to three damages, opened; the ones that open also generate."""
    opened, before = 0, peak()
    for seed in range(500):
        rng, folder = random.Random(seed), tmp_path / "folder"
        shutil.copytree(saved, folder)
        done = [damage(folder, rng) for _ in range(rng.randint(1, 3))]
        start = time.process_time()
        try:
            pipeline = LatentDiffusionPipeline.from_pretrained(folder)
            opened += 1
            pipeline("a red apple", seed=0, num_inference_steps=2, progress=False)
        except ValueError as error:
            lines = str(error).split("\n")  # one for each problem of a config
            assert all(0 < len(line) < 500 and line.isprintable() for line in lines), (seed, done, lines)
        assert time.process_time() - start < SECONDS, (seed, done)
        shutil.rmtree(folder)
    assert 10 < opened < 400 and peak() - before < MEBIBYTES

"""What --explain prints, and the reference configs, which are generated from the same descriptions."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticUndefined
from scripts import ROOT

from latentdiff.config import Section, UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.explain import EXAMPLE_KEYS, EXAMPLE_SECTIONS, WIDTH, differing, explain, reference_yaml, type_text

BOTH = pytest.mark.parametrize(("kind", "stage"), [(VAETrainingConfig, "vae"), (UNetTrainingConfig, "unet")])


def reference(stage: str) -> Path:
    return ROOT / "configs" / "reference" / f"{stage}.yaml"


def keys_of(kind: type[Section]) -> Iterator[tuple[str, Any]]:
    """The dotted names of all keys of a config and their defaults, from the classes; PydanticUndefined if required."""
    for name, field in kind.model_fields.items():
        section: Any = field.annotation
        if is_dataclass(section):
            yield from ((f"{name}.{key.name}", key.default) for key in fields(section))
        elif isinstance(section, type) and issubclass(section, Section):
            yield from ((f"{name}.{key}", value.default) for key, value in section.model_fields.items())
        else:
            yield name, field.default


def value_at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


@BOTH
def test_reference_files_are_up_to_date(kind, stage):
    """`python -m latentdiff.explain` writes them."""
    text = reference(stage).read_text(encoding="utf-8")
    assert text == reference_yaml(kind)
    assert max(map(len, text.splitlines())) <= WIDTH


@BOTH
def test_reference_has_every_key_with_its_default(kind, stage):
    values = yaml.safe_load(reference(stage).read_text(encoding="utf-8"))
    defaults = dict(keys_of(kind))
    written = {
        f"{section}.{key}" if key else section
        for section, value in values.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert written == set(defaults) and len(written) > 50
    for name, default in defaults.items():
        if default is PydanticUndefined or name.startswith(EXAMPLE_SECTIONS) or name in EXAMPLE_KEYS:
            continue
        assert value_at(values, name) == (list(default) if isinstance(default, tuple) else default), name


@BOTH
def test_reference_is_a_valid_config(kind, stage):
    config = load_config(kind, reference(stage))
    demo = load_config(kind, ROOT / "configs" / "demo" / f"{stage}.yaml")
    assert config.model == demo.model and config.optimizer.lr == demo.optimizer.lr


@BOTH
def test_every_key_is_explained(kind, stage):
    text = explain(kind)
    lines = text.splitlines()
    for name, default in keys_of(kind):
        (number,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"{name}: ")]
        entry = " ".join(lines[number : number + 3])
        assert ("; required" in entry.partition("; default")[0]) == (default is PydanticUndefined), name
        assert lines[number + 1].startswith("    ")  # the meaning, or the rest of the types
    assert max(map(len, lines)) <= WIDTH
    assert "  optimizer.warmup_steps: integer >= 0; default 0\n      Linear warm-up from 0, optimiser steps.\n" in text
    size = "integer in 1 .. 16384 or [integer in 1 .. 16384, integer in 1 .. 16384]"
    assert f"  data.size: {size}; required\n" in text


def test_sections_are_chosen():
    text = explain(UNetTrainingConfig, ["optimizer", "vae"])
    assert text.startswith("optimizer: The optimiser") and "\nvae: text or null; required\n" in text
    assert "data." not in text
    assert explain(UNetTrainingConfig, ["data", "train"]).count("\n\n") == 1


def test_unknown_section_is_one_line_that_names_the_known_ones():
    with pytest.raises(ValueError) as error:
        explain(VAETrainingConfig, ["optimizer", "optimiser"])
    known = "data, model, init_from, freeze_encoder, loss, optimizer, train, ema, validation, logging, output"
    assert str(error.value) == f"unknown section 'optimiser', must be one of {known}"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1}, "integer >= 1"),
        ({"type": "number", "ge": 0.0, "le": 1.0}, "number in 0 .. 1"),
        ({"type": "number", "exclusiveMinimum": 0.0, "exclusiveMaximum": 0.28}, "number > 0 and < 0.28"),
        ({"enum": ["a", "b", "c"], "type": "string"}, "a, b or c"),
        (
            {"anyOf": [{"minimum": 1, "type": "integer"}, {"const": "auto"}, {"type": "null"}]},
            "integer >= 1, auto or null",
        ),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "array", "prefixItems": [{"type": "number"}, {"type": "integer"}]}, "[number, integer]"),
    ],
)
def test_types_are_in_words(schema, text):
    assert type_text(schema) == text


def test_keys_that_differ_from_the_defaults():
    """Required keys always, others where the value is another one, whether or not it was written."""
    path = ROOT / "configs" / "demo" / "unet.yaml"
    found = differing(load_config(UNetTrainingConfig, path, ["vae=null", "optimizer.eps=1.0e-8", "data.flip=0.5"]))
    assert found["data.flip"] == "0.5" and found["vae"] == "null" and found["optimizer.betas"] == "[0.9, 0.99]"
    assert "optimizer.eps" not in found and "data.crop" not in found and "loss.loss_type" not in found
    assert found["diffusion.prediction_type"] == "v_prediction" and found["data.source"] == "embedded:compositions"

"""What a model was trained on: written into its folder, and compared with what is asked of it."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from samples import options
from scripts import ROOT
from tiny import tiny_pipeline

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.trained_on import TRAINED_ON_FILE, TrainedOn, words_of
from latentdiff.training.unet_model import trained_on

SEEN = TrainedOn(captions=True, unconditional=True, words=("a", "apple", "green", "pear", "straße"))


def asked(seen: TrainedOn, prompt: str, **changes: object) -> list[str]:
    """The warnings of a call."""
    pipeline = tiny_pipeline()
    pipeline.trained_on = seen
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline(prompt, **options(**changes))
    return [str(warning.message) for warning in caught]


def test_words() -> None:
    texts = ["A red apple, 3 pears", "an Äpfel's apple_tree", "日本 猫", ""]
    assert words_of(texts) == ["a", "red", "apple", "pears", "an", "äpfel", "s", "tree"]


@pytest.mark.parametrize(
    ("seen", "prompt", "changes", "expected"),
    [
        (SEEN, "a Green apple", {}, []),
        (SEEN, "", {}, []),
        (SEEN, "a dog eating a pear", {}, ["not in any caption that this model was trained on: dog, eating"]),
        (SEEN, "a pear", {"negative_prompt": "fog"}, ["not in any caption that this model was trained on: fog"]),
        (SEEN, "a pear", {"negative_prompt": "fog", "guidance_scale": 1.0}, []),
        (
            SEEN,
            " ".join(["b", "c", "d", "e", "f", "g"]),
            {},
            ["not in any caption that this model was trained on: b, c, d, e, f, ..."],
        ),
        (
            SEEN,
            "a pear " * 60,
            {},
            ["the longest prompt needs 2 rows of tokens, the model was trained on captions of one"],
        ),
        (replace(SEEN, words=None), "a dog", {}, []),
        (replace(SEEN, unconditional=False), "a pear", {"guidance_scale": 1.0}, []),
        (replace(SEEN, unconditional=False), "a pear", {}, ["this model was trained without caption dropout, so it"]),
        (replace(SEEN, unconditional=False), "", {"guidance_scale": 1.0}, ["this model was trained without caption d"]),
        (TrainedOn(captions=False, unconditional=True), "a dog", {}, ["this model was trained without captions: prom"]),
        (TrainedOn(captions=False, unconditional=True), "", {}, []),
    ],
)
def test_what_training_never_showed_is_warned_of(
    seen: TrainedOn, prompt: str, changes: dict, expected: list[str]
) -> None:
    found = asked(seen, prompt, **changes)
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found


def test_the_folder_keeps_it(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert LatentDiffusionPipeline.from_pretrained(tmp_path).trained_on is None
    pipeline.trained_on = SEEN
    pipeline.save_pretrained(tmp_path)
    assert LatentDiffusionPipeline.from_pretrained(tmp_path).trained_on == SEEN
    for text, message in [
        ('{"captions": 1, "unconditional": true}', "captions must be true or false"),
        ('{"captions": true, "unconditional": true, "words": [1]}', "words must be a list of texts, or null"),
        ('{"captions": true}', "lacks the key unconditional"),
        ("[]", "must hold a JSON object"),
    ]:
        (tmp_path / TRAINED_ON_FILE).write_text(text)
        with pytest.raises(ValueError, match=rf"{TRAINED_ON_FILE}.*{message}"):
            LatentDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.runs
def test_a_finished_run_knows_its_captions(unet_run: Path) -> None:
    seen = LatentDiffusionPipeline.from_pretrained(unet_run).trained_on
    assert seen is not None and seen.captions and seen.unconditional
    assert seen.words is not None and {"noto", "style", "crown"} <= set(seen.words) and "dog" not in seen.words


@pytest.mark.parametrize(
    ("dropout", "captions", "expected"),
    [
        ("0.1", ["A red apple", "a pear"], TrainedOn(True, True, ("a", "apple", "pear", "red"))),
        ("0.0", ["a pear"], TrainedOn(True, False, ("a", "pear"))),
        ("0.0", ["a pear", ""], TrainedOn(True, True, ("a", "pear"))),
        ("[1.0, 0.1]", ["a pear"], TrainedOn(True, True, ("a", "pear"))),
        ("1.0", ["a pear"], TrainedOn(False, True, ("a", "pear"))),
        ("0.1", ["", ""], TrainedOn(False, True, ())),
    ],
)
def test_what_a_run_shows(dropout: str, captions: list[str], expected: TrainedOn) -> None:
    overrides = [f"train.caption_dropout={dropout}", "validation.guidance_scale=1.0"]
    config = load_config(UNetTrainingConfig, ROOT / "configs" / "demo" / "unet.yaml", overrides)
    assert trained_on(config, captions) == expected
    too_many = " ".join(map("".join, itertools.product("abcdefghijkl", repeat=4)))
    assert trained_on(config, [*captions, too_many]).words is None

"""tools/choose_held_out.py, and the list that it wrote."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from latentdiff.config import UNetTrainingConfig, load_config
from tools.build_emoji import DEFAULT_STYLES
from tools.choose_held_out import choose_held_out, main, nearest_distances

LIST = Path(__file__).parents[2] / "configs" / "emoji-styles" / "held_out.txt"


def rows(**styles: int) -> list[dict[str, str]]:
    """So many objects of each style, object by object."""
    return [
        {"style": style, "label": f"object {i}"}
        for i in range(max(styles.values()))
        for style, count in styles.items()
        if i < count
    ]


def test_pairs_are_spread_over_styles_and_objects() -> None:
    everything = rows(a=40, b=30, c=20, d=10)
    far = [1.0] * len(everything)
    pairs = choose_held_out(everything, far, 16)
    assert Counter(style for style, _ in pairs) == dict.fromkeys("abcd", 4)
    assert len({label for _, label in pairs}) == 16
    order = [(row["style"], row["label"]) for row in everything]
    assert pairs == sorted(pairs, key=order.index) == choose_held_out(everything, far, 16)
    # Only objects in three styles: the first twenty.
    assert {label for _, label in pairs} <= {f"object {i}" for i in range(20)}


def test_drawings_like_others_are_not_chosen() -> None:
    everything = rows(a=4, b=4, c=4)
    near = [0.0 if row["label"] == "object 2" else 0.01 for row in everything]
    assert {label for _, label in choose_held_out(everything, near, 3)} == {"object 0", "object 1", "object 3"}
    with pytest.raises(ValueError, match="^count is 6, but style 'a' has too few objects for its share$"):
        choose_held_out(everything, near, 6)
    with pytest.raises(ValueError, match="^count is 4, must be a multiple of 3, the number of styles$"):
        choose_held_out(everything, near, 4)


def test_distance_is_to_the_nearest_other_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.choose_held_out.CHUNK", 2)
    images = np.array([[0, 0], [1, 1], [1, 1], [0, 0.5], [-1, 0]], np.float32)
    assert nearest_distances(images) == pytest.approx([0.125, 0, 0, 0.125, 0.5])


def test_the_list_is_even() -> None:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    assert Counter(style for style, _ in pairs) == dict.fromkeys(DEFAULT_STYLES, 60)
    assert len({label for _, label in pairs}) == 300


def test_command_refuses_a_folder_that_is_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), str(tmp_path / "list.txt")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "is not a set without splits" in error and error.count("\n") == 1
    assert not (tmp_path / "list.txt").exists()


def test_the_recipes_prompts_are_held_out_as_they_say() -> None:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    held_out = {"{} style, {}".format(*line.split("\t")) for line in lines if not line.startswith("#")}
    config = load_config(UNetTrainingConfig, LIST.with_name("unet.yaml"))
    assert [prompt in held_out for prompt in config.validation.prompts] == [True] * 8 + [False] * 4

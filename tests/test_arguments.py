"""The command line of the training scripts."""

import pytest

from latentdiff.training.arguments import TrainArguments, parse_arguments


def test_overrides_from_files(tmp_path):
    """A file has one a line, with comments and empty lines; what comes later wins, which load_config sees to."""
    path = tmp_path / "small.args"
    lines = ["# a small network", "model.block_out_channels=[32, 64]   # two levels", "", "  train.steps=7"]
    path.write_text("\n".join([*lines, "validation.prompts=[a #1]", ""]))
    parsed = parse_arguments(["unet.yaml", f"@{path}", "train.steps=8", "--resume", "never"], "about")
    overrides = ("model.block_out_channels=[32, 64]", "train.steps=7", "validation.prompts=[a", "train.steps=8")
    assert parsed == TrainArguments("unet.yaml", overrides, "never")


def test_a_hash_inside_a_value_is_no_comment(tmp_path):
    path = tmp_path / "small.args"
    path.write_text("output.folder=saved/run#2\n")
    assert parse_arguments(["unet.yaml", f"@{path}"], "about").overrides == ("output.folder=saved/run#2",)


def test_a_missing_file_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["unet.yaml", f"@{tmp_path}/nowhere.args"], "about")
    assert end.value.code == 2 and "nowhere.args" in capsys.readouterr().err

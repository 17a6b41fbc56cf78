"""The command line of the training scripts."""

import pytest
from scripts import ROOT

from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.training.arguments import TrainArguments, parse_arguments

CONFIG = ROOT / "configs" / "sanity" / "unet.yaml"


def test_overrides_from_files(tmp_path):
    """A file has one a line, with comments and empty lines; values are YAML, which has comments of its own."""
    path = tmp_path / "small.args"
    lines = ["# a small network", "model.block_out_channels=[32, 64, 64, 96]   # four levels", "", "  train.steps=7"]
    path.write_text("\ufeff" + "\n".join([*lines, 'validation.prompts=["a #1 hat"]', ""]), encoding="utf-8")
    parsed = parse_arguments(["unet.yaml", f"@{path}", "train.steps=8", "--resume", "never"], "about")
    first = (
        "model.block_out_channels=[32, 64, 64, 96]   # four levels",
        "train.steps=7",
        'validation.prompts=["a #1 hat"]',
    )
    assert parsed == TrainArguments("unet.yaml", (*first, "train.steps=8"), "never")
    config = load_config(UNetTrainingConfig, CONFIG, parsed.overrides)
    assert config.model.block_out_channels[:2] == (32, 64) and config.validation.prompts == ("a #1 hat",)
    assert config.train.steps == 8  # what comes later wins


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "@{path} cannot be read: "),
        (b"\xff\xfe", "@{path} cannot be read: "),
        (b"train.steps=7\n--resume never\n", "{path}, line 2 is '--resume never', must be of the form section.key=v"),
        (b"@{path}\n", "{path}, line 1 is '@"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "small.args"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        parse_arguments(["unet.yaml", f"@{path}"], "about")
    assert str(error.value).startswith(message.format(path=path))

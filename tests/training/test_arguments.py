"""The command line of the training scripts."""

import errno
import sys
import warnings
from collections.abc import Sequence

import pytest
import torch
from scripts import ROOT

from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config
from latentdiff.explain import explain, reference_yaml
from latentdiff.training.arguments import TrainArguments, parse_arguments, run_as_command

CONFIG = ROOT / "configs" / "sanity" / "unet.yaml"


def test_overrides_are_read_from_files(tmp_path):
    """One override per line, with comments and empty lines; values are YAML, which has comments of its own."""
    path = tmp_path / "small.args"
    lines = ["# a small network", "model.block_out_channels=[32, 64, 64, 96]   # four levels", "", "  train.steps=7"]
    path.write_text("\ufeff" + "\n".join([*lines, 'validation.prompts=["a #1 hat"]', ""]), encoding="utf-8")
    parsed = parse_arguments(["unet.yaml", f"@{path}", "train.steps=8", "--resume", "never"], "unet")
    first = (
        "model.block_out_channels=[32, 64, 64, 96]   # four levels",
        "train.steps=7",
        'validation.prompts=["a #1 hat"]',
    )
    assert parsed == TrainArguments("unet.yaml", (*first, "train.steps=8"), "never")
    config = load_config(UNetTrainingConfig, CONFIG, parsed.overrides)
    assert config.model.block_out_channels[:2] == (32, 64) and config.validation.prompts == ("a #1 hat",)
    assert config.train.steps == 8  # the later one wins


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "@{path} cannot be read: "),
        (b"\xff\xfe", "@{path} cannot be read: "),
        (b"train.steps=7\n--resume never\n", "{path}, line 2 is '--resume never', must be of the form section.key=v"),
        (b"@{path}\n", "{path}, line 1 is '@"),
    ],
)
def test_wrong_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "small.args"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        parse_arguments(["unet.yaml", f"@{path}"], "unet")
    assert str(error.value).startswith(message.format(path=path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "never", "a.yaml", "train.steps=3", "optimizer.lr=1e-3"],
        ["a.yaml", "--resume", "never", "train.steps=3", "optimizer.lr=1e-3"],
        ["a.yaml", "train.steps=3", "--resume=never", "optimizer.lr=1e-3"],
        ["a.yaml", "--train.steps=3", "--resume=never", "--optimizer.lr", "1e-3"],  # as other trainers have them
    ],
)
def test_options_and_overrides_are_in_any_order(arguments):
    expected = TrainArguments("a.yaml", ("train.steps=3", "optimizer.lr=1e-3"), "never")
    assert parse_arguments(arguments, "unet") == expected
    assert parse_arguments(["a.yaml"], "unet") == TrainArguments("a.yaml", (), "latest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "--resum", "never"], "No such option: --resum"),
        (["a.yaml", "--resume"], "--resume"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments, "unet")
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and message in output.err and output.err.count("\n") == 1


def test_missing_config_is_refused():
    with pytest.raises(ValueError, match="^CONFIG is missing, must be a YAML config"):
        parse_arguments([], "unet")


def test_resume_from_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^--resume is lastest, must be latest, never or the folder of a checkpoint"):
        parse_arguments(["a.yaml", "--resume", "lastest"], "unet")
    assert parse_arguments(["a.yaml", "--resume", str(tmp_path)], "unet").resume == str(tmp_path)


@pytest.mark.parametrize(("stage", "kind"), [("vae", VAETrainingConfig), ("unet", UNetTrainingConfig)])
def test_help_ends_with_an_example_and_every_key(stage, kind, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"], stage, f"latentdiff train-{stage}")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"(stage {1 if stage == 'vae' else 2})" in text and "--resume latest|never|FOLDER" in text
    assert f"Example: latentdiff train-{stage} configs/demo/{stage}.yaml" in text and text.endswith(
        reference_yaml(kind)
    )


def test_explain_prints_the_sections_and_exits(capsys):
    for sections in ([], ["optimizer"], ["data", "train"]):
        with pytest.raises(SystemExit) as end:
            parse_arguments(["--explain", *sections], "unet")
        assert end.value.code == 0
        assert capsys.readouterr().out == explain(UNetTrainingConfig, sections)
    with pytest.raises(ValueError, match="^unknown section 'optimiser', must be one of vae, .*optimizer"):
        parse_arguments(["--explain", "optimiser"], "unet")


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ValueError("a is 1, must be 2"), "error: a is 1, must be 2\n", 2),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.png"),
            "error: [Errno 28] No space left on device: 'x.png' (--traceback shows where)\n",
            1,
        ),
        (
            FileNotFoundError(
                "Caught FileNotFoundError in DataLoader worker process 0.\nTraceback\n  x\nno such image"
            ),
            "error: no such image (--traceback shows where)\n",
            1,
        ),
        (ValueError("no '\x1b[31m'"), "error: no '\\x1b[31m'\n", 2),  # a terminal would turn red
        (MemoryError(), "error: out of memory: MemoryError (--traceback shows where)\n", 1),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "error: out of memory: CUDA out of memory. (--trace", 1),
    ],
)
def test_expected_failures_are_one_line(error, line, status, capsys):
    seen: list[Sequence[str]] = []

    def main(arguments: Sequence[str]) -> None:
        seen.append(arguments)
        raise error

    with pytest.raises(SystemExit) as ended:
        run_as_command(main, ["a", "b"])
    assert ended.value.code == status and capsys.readouterr().err.startswith(line)
    with pytest.raises(type(error)):
        run_as_command(main, ["a", "--traceback", "b"])
    assert seen == [["a", "b"], ["a", "b"]]


def test_a_warning_is_one_line(capsys):
    """What is for developers keeps its place in the code."""

    def main(arguments: Sequence[str]) -> None:
        warnings.warn("the \x1b[31mred one", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():  # pytest's own way of showing them aside
        warnings.simplefilter("always")
        warnings.showwarning = lambda *parts: sys.stderr.write(warnings.formatwarning(*parts[:4]))
        run_as_command(main, [])
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "warning: the \\x1b[31mred one" and second.startswith(__file__) and "DeprecationWarning" in second


def test_memory_that_cannot_be_had_is_one_line(capsys):
    with pytest.raises(SystemExit, match="1"):
        run_as_command(lambda given: torch.empty(10**15), [])
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_as_command(lambda given: {}["a"], [])

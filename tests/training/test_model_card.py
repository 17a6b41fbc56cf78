"""The model card: what it says is true and parses, hostile text stays text, and an edited one is never replaced."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from latentdiff.commands.cli import main
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.data_record import DataRecord
from latentdiff.training.exported_card import write_exported_card
from latentdiff.training.model_card import (
    Copy,
    Origin,
    card,
    escaped,
    fenced,
    images_shown,
    refresh_card,
    without_private_paths,
    write_card,
)

ORIGIN = Origin(("train_unet.py", "a.yaml"), 20, 4, "0123456789abcdef", {"latentdiff": "1", "torch": "2"})


def record(run: Path) -> DataRecord:
    return DataRecord.from_json(json.loads((list_checkpoints(run)[-1] / "data.json").read_text()))


def header(text: str) -> dict[str, object]:
    """The YAML at the top, read twice."""
    assert text.startswith("---\n")
    values = yaml.safe_load(text[4:].partition("\n---\n")[0])
    parsed = ModelCard(text, ignore_metadata_errors=False)
    assert parsed.data.to_dict() == values
    return values


@pytest.fixture
def run(unet_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unet_run, tmp_path / "run")


def change(run: Path, section: str, **values: object) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.runs
def test_stage_2_says_what_it_made(unet_run: Path) -> None:
    text = (unet_run / "README.md").read_text()
    assert header(text) == {
        "license": "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["latentdiff", "latent-diffusion"],
    }
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        count = sum(t.numel() for t in load_file(unet_run / f"{part}.safetensors").values() if t.is_floating_point())
        assert f" | {count:,} | " in text
    assert "images of 16 x 16 pixels" in text and "4 latent channels" in text
    assert "![samples at step 6](samples/step_00000006.png)" in text and "1. red apple\n2. rocket\n" in text
    lines = [json.loads(line) for line in (unet_run / "metrics.jsonl").read_text().splitlines()]
    published = next(line["published_step"] for line in lines if "published_step" in line)
    loss = next(line["validation/loss"] for line in lines if line["step"] == published and "validation/loss" in line)
    assert f"(EMA) of step {published} of 6. Their validation loss is {loss:.4g}, the lowest." in text
    report = json.loads(
        (Path(yaml.safe_load((unet_run / "config.yaml").read_text())["vae"]) / "vae_report.json").read_text()
    )
    assert f"| 4 held-out | {report['report']['psnr']:.2f} | {report['report']['ssim']:.4f} |" in text
    assert "embedded, 20 training images, 4 held out; fingerprint `" in text and f"torch {torch.__version__}" in text
    assert "latentdiff train-unet unet.yaml logging.progress=false " in text and " vae=vae " in text
    assert str(unet_run.parent) not in text and str(Path.cwd()) not in text  # also in the comment at its end


@pytest.mark.runs
def test_stage_1_says_what_it_made(vae_run: Path) -> None:
    text = (vae_run / "README.md").read_text()
    assert header(text) == {"license": "unknown", "library_name": "diffusers", "tags": ["latentdiff", "autoencoder"]}
    assert "latents of 4 x 8 x 8" in text and "Their held-out MSE is " in text and "| 4 held-out | " in text


@pytest.mark.runs
def test_the_fingerprint_is_of_the_data_alone(run: Path) -> None:
    """In any order and under any names; another caption is other data."""
    data = record(run).to_json()
    one = Origin.of(DataRecord.from_json(data), []).digest
    data["images"] = [["other/" + name, image, caption] for name, image, caption in reversed(data["images"])]
    assert Origin.of(DataRecord.from_json(data), []).digest == one
    data["images"][0][2] = "0" * 16
    assert Origin.of(DataRecord.from_json(data), []).digest != one


@pytest.mark.runs
def test_only_our_own_unchanged_card_is_replaced(run: Path, tmp_path: Path) -> None:
    path, data = run / "README.md", record(run)
    assert write_card(run, data, ["train_unet.py", "b.yaml"]) == f"model card in {path}: fill in its licence"
    assert "latentdiff train-unet b.yaml\n" in path.read_text()
    edited = path.read_text().replace("license: unknown", "license: mit")
    for other in (edited, edited + "\n", "# mine\n", "", "\n<!-- latentdiff-card {} -->\n"):
        path.write_text(other)
        assert "it is left as it is" in write_card(run, data, []) and path.read_text() == other
        assert refresh_card(run) is None and path.read_text() == other
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert "it is left as it is" in write_card(run, data, []) and not (tmp_path / "nowhere").exists()
    path.unlink()
    assert refresh_card(run) is None and not path.exists()
    (run / "config.yaml").write_text("{")
    assert write_card(run, data, []).startswith("no model card is written: config ")


@pytest.mark.runs
def test_samples_are_of_the_published_step(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "published_step": 4}\n')
    text = card(run, ORIGIN)
    assert "of step 4 of 6." in text and "![samples at step 3](samples/step_00000003.png)" in text
    (run / "samples" / "step_00000003.png").unlink()
    assert "(samples/step_00000006.png)" in card(run, ORIGIN)


@pytest.mark.runs
def test_a_copy_with_other_weights(run: Path, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "ema-0.100", "ema-0.100", 6, "the averages (`latentdiff ema`, length 0.1)")
    LatentDiffusionPipeline.from_pretrained(run).save_pretrained(copy.model)
    assert write_exported_card(copy, run, None, None) == "its model card is README.md: fill in its licence"
    text = (copy.model / "README.md").read_text()
    assert (
        "\n# ema-0\\.100\n" in text
        and "The weights are the averages (`latentdiff ema`, length 0.1) of step 6 of 6.\n" in text
    )
    line = write_exported_card(copy, run, None, None)
    assert line == f"{copy.model / 'README.md'} is there already and is left as it is"
    (copy.model / "README.md").unlink()
    (run / "README.md").unlink()
    shutil.rmtree(run / "checkpoints")
    line = write_exported_card(copy, run, None, None)
    assert line == f"no model card is written: neither README.md nor a checkpoint in {run} says what it was trained on"


@pytest.mark.runs
def test_a_run_without_its_log_does_not_say_which_step_it_is_of(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "The weights are the averages (EMA) of an unknown step of 6.\n" in card(run, ORIGIN)


@pytest.mark.runs
def test_a_card_of_others_is_copied_with_its_images_and_nothing_from_outside(run: Path, tmp_path: Path) -> None:
    def copied(name: str) -> tuple[str, Path]:
        return write_exported_card(Copy(tmp_path / name, name), run, None, None), tmp_path / name

    (tmp_path / "private.png").write_bytes(b"private")
    names = ["a%20b.png", "../private.png", "link.png", f"{'x' * 300}.png", "samples/step_00000006.png"]
    (run / "a b.png").write_bytes(b"image")
    (run / "link.png").symlink_to(tmp_path / "private.png")
    (run / "README.md").write_text("# mine\n" + "\n".join(f"![]({name})" for name in names))
    line, folder = copied("copy")
    assert line == "its model card is README.md" and (folder / "README.md").read_text().startswith("# mine\n")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "config.yaml", "a b.png", "samples/step_00000006.png"}
    # Neither endless nor quadratic, and the config is there without a card.
    (run / "README.md").write_text("![" * 400_000 + "<img " * 30_000)
    assert images_shown(run / "README.md") == []
    with (run / "README.md").open("wb") as file:
        file.truncate(2**31)
    line, folder = copied("large")
    assert "no model card is written: " in line and "has 2,147,483,648 bytes, must have at most 1,000,000" in line
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    # Links to files outside of it may be to anything.
    (tmp_path / "secret").write_text("secret: 1")
    for name in ("README.md", "config.yaml"):
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "secret")
    line, folder = copied("links")
    assert line.startswith("no model card is written: neither") and not folder.exists()


@pytest.mark.runs
def test_hostile_text_stays_text(run: Path) -> None:
    prompts = [
        "a | b\n# c",
        "<script>alert(1)</script>",
        "---\nlicense: mit\n---",
        "``` `x`",
        "[a](http://b) ![c](d)",
        "",
    ]
    prompts += ["x\x1b[31m\u202ey", "- a", "1. b", "<!-- c -->", "*a* _b_ &amp; $x$", "z" * 5000]
    change(run, "validation", prompts=prompts)
    change(run, "data", source="/home/me/a|b: c\n# d")
    shutil.move(run, run.with_name("r|u: n\n# x"))
    run = run.with_name("r|u: n\n# x")
    text = card(run, Origin(("train_unet.py", "a```\nb", "-->"), 1, 0, "0", {"torch": "2"}))
    assert header(text)["license"] == "unknown" and "\x1b" not in text and "\u202e" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        *("# r\\|u\\: n \\# x", "## Use", "## Parts", "## Training", "## Measured", "## Licence")
    ]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text)  # without the blocks of code
    assert "<script" not in outside.replace("\\<script", "") and "![c]" not in outside.replace("\\!\\[c", "")
    assert outside.count("\n---\n") == 1 and "/home/me" not in text
    assert max(map(len, text.splitlines())) < 1000
    assert fenced("a\n```\nb", "") == "````\na\n```\nb\n````"
    assert escaped("a | <b> [c](d)\n# e") == "a \\| \\<b\\> \\[c\\]\\(d\\) \\# e"


@pytest.mark.runs
def test_signature_survives_any_command(run: Path) -> None:
    (run / "README.md").unlink()
    write_card(run, record(run), ["train_unet.py", "--> <!-- -- \n} -->"])
    assert refresh_card(run) is not None


@pytest.mark.runs
def test_evaluation_is_of_these_weights(run: Path, capsys) -> None:
    figures = {"prompts": 3, "styles": {"held-out": {"exact": {"hits": 2, "total": 3}, "psnr": 21.25}}, "a|b": "c|d"}
    (run / "evaluation.json").write_text(json.dumps(figures))
    text = card(run, ORIGIN)
    assert "| styles, held-out, exact | 2 of 3 |" in text and "| a\\|b | c\\|d |" in text
    os.utime(run / "evaluation.json", (1, 1))
    assert "styles, held-out" not in card(run, ORIGIN)
    main(["evaluate", str(run), "--prompts", "2", "--device", "cpu", "--no-progress"])
    assert "| nearest is prompted | " in (run / "README.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].startswith("model card in ")


@pytest.mark.runs
def test_without_captions_it_is_no_text_to_image_model(run: Path) -> None:
    (run / "trained_on.json").write_text('{"captions": false, "unconditional": true, "words": null}')
    assert header(card(run, ORIGIN))["pipeline_tag"] == "unconditional-image-generation"


def test_private_paths() -> None:
    kept = ["embedded:compositions", "owner/name", "saved/demo", "hf://datasets/a", "", "a~b", "c:d"]
    assert without_private_paths({"a": kept}) == {"a": kept}
    private = [
        "/home/me/photos",
        "~/photos",
        "../photos",
        "file:///home/me/photos",
        "C:\\Users\\me\\photos",
        "~me/photos/",
    ]
    assert without_private_paths({"a": {"b": private}}) == {"a": {"b": ["photos"] * len(private)}}
    assert without_private_paths({"a": None, "prompts": ["/x"], "b": 1}) == {"a": None, "prompts": ["/x"], "b": 1}
    assert Origin.of(
        DataRecord.from_json({"images": [], "held_out": [], "frozen": {}}),
        ["train_vae.py", "/home/me/a.yaml", "data.source='/home/me/b'", "data.size=[4, 8]", "init_from=~/c"],
    ).command == ("train_vae.py", "a.yaml", "data.source=b", "data.size=[4, 8]", "init_from=c")

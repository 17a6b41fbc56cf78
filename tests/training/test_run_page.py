"""The page of a run: what it says, that it is one file, that nothing in it is taken for HTML, and in a browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import warnings
from hashlib import sha256
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from metric_lines import STAGE_1, STAGE_2, validated
from PIL import Image
from scripts import ROOT, run_unet, run_vae

import latentdiff.training.run
from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.figures.grids import image_grid
from latentdiff.formats.files import PNG_KEY, write_json, write_png
from latentdiff.formats.locks import holding_file
from latentdiff.training.contact_sheet import ContactSheet
from latentdiff.training.run_folder import LOCK_FILE
from latentdiff.training.run_page import _shrunk, heat_colours, write_page

PROMPTS = ["red apple", "a green heart", "rocket"]


class Page(HTMLParser):
    """Elements with their attributes in order, the text in each kind of element, and what is in scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [own for name, own in self.elements if name == tag and wanted.items() <= own.items()]


def write_run(run: Path, lines: list[dict] = STAGE_2, *overrides: str, stage: str = "unet") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kind = UNetTrainingConfig if stage == "unet" else VAETrainingConfig
    fixed = ["data.size=16", "train.steps=400", f"output.folder={json.dumps(str(run))}"]
    fixed += [f"validation.prompts={json.dumps(PROMPTS)}"] if stage == "unet" else ["train.crop_size=null"]
    fixed += ["train.whole_image_steps=0"] if stage == "vae" else ["model.sample_size=4"]
    (run / "config.yaml").write_text(
        to_yaml(load_config(kind, ROOT / f"configs/demo/{stage}.yaml", [*fixed, *overrides]))
    )
    return run


def write_grid(
    run: Path, step: int, count: int = 3, prompts: list[str] | None = None, columns: int | None = None
) -> None:
    grid = image_grid([Image.new("RGB", (16, 16), (80 * i, step % 256, 0)) for i in range(count)], columns)
    if prompts is not None:
        grid.info[PNG_KEY] = json.dumps({"prompts": prompts})
    write_png(grid, run / "samples" / f"step_{step:08d}.png")


def read(run: Path) -> Page:
    write_page(run)
    page = Page(run / "index.html")
    assert page.open == []
    return page


# ----------------------------------------------------------------------------------------------------------------------
# What it says


def test_stage_2(tmp_path: Path) -> None:
    page = read(write_run(tmp_path / "mine", STAGE_2))
    assert page.texts["h1"] == ["mine"] and page.texts["title"][0] == "mine"
    assert page.texts["div"][3:7] == [
        "step40 / 400stopped",
        "training loss0.2mean of 10 steps",
        "validation loss0.025best 0.025 at step 40",
        "speed50 images/sof the steps alone",
    ]
    assert page.all("progress") == [{"max": "400", "value": "40"}]
    verdict = next(text for text in page.texts["section"] if text.startswith("Learning."))
    assert "fallen from 4 at step 0 to 0.025 at step 40 (a constant prediction has 4)" in verdict
    assert page.all("section", id="verdict") == [{"class": "panel verdict", "id": "verdict"}]
    assert any(text == f"latentdiff train-unet {tmp_path / 'mine' / 'config.yaml'}" for text in page.texts["pre"])
    settings = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert (
        settings["data.size"] == "16" and settings["optimizer.kind"] == "muon" and "ema.snapshot_every" not in settings
    )


def test_the_heat_map_has_every_value(tmp_path: Path) -> None:
    """Validation loss over baseline, clean at the top; steps across."""
    page = read(write_run(tmp_path, STAGE_2))
    assert page.texts["th"] == ["", "0", "10", "20", "30", "40", "1 clean", "2", "3 noise"]
    losses = [4.0, 0.1, 0.05, 1 / 30, 0.025]
    assert page.texts["td"] == [f"{(loss + b) / (4 + b):.2f}" for b in range(3) for loss in losses]
    many = [validated(step, 1.0, 0.0) for step in range(0, 3000, 100)]
    heads = [text for text in read(write_run(tmp_path, [*STAGE_2, *many])).texts["th"] if text[:1].isdigit()]
    assert heads[0] == "0" and heads[10] == "2,900" and len(heads) == 11 + 3


def test_heat_colours_can_be_read() -> None:
    """Lightness alone orders the ratios up to 1, and text on each has the contrast that WCAG 2 asks for (4.5)."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [tuple(map(luminance, heat_colours(ratio / 100))) for ratio in range(0, 301)]
    lights = [light for light, _ in pairs[:101]]
    assert lights == sorted(lights) and lights[0] < 0.04 and lights[-1] > 0.9
    for one, other in pairs:
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 4.5
    red, blue = (int(heat_colours(1.3)[0][i : i + 2], 16) for i in (1, 5))
    assert red > blue + 80  # orange


def test_curves_are_drawn_to_scale(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, STAGE_2))
    lines = {own["stroke"]: own["points"] for own in page.all("polyline")}
    assert len(lines) == 4
    training, validation, baseline = lines["#0072B2"], lines["#D55E00"], lines["#777777"]
    assert [point.split(",")[0] for point in training.split()] == ["166.0", "280.0", "394.0", "508.0"]
    ys = [float(point.split(",")[1]) for point in validation.split()]
    # On a logarithmic scale: 0.1, 0.05 and 0.025 are equally far apart.
    assert ys[2] - ys[1] == pytest.approx(ys[4] - ys[2], abs=0.2) and ys[0] == float(baseline.split()[0].split(",")[1])
    legend = [text for text in page.texts["span"] if ": " in text]
    assert "validation: 0.025" in legend and "as many training images, same noise: 0.021" in legend
    assert "best validation: step 40" in legend
    huber = read(write_run(tmp_path, STAGE_2, "loss.loss_type=huber"))  # which validation does not measure
    assert "Training loss (huber) over the optimiser steps" in huber.texts["h2"]


def test_samples_are_cut_out_of_their_grids_with_their_prompts(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_grid(run, 10)
    write_grid(run, 40, prompts=["rocket", "red apple", "blue cat"])
    write_grid(run, 50)  # after the last line of the log: of a continuation that was given up
    sheet = ContactSheet(
        ["a caption"], 1, 9, 2, {"red apple": "training caption", "rocket": "new", "blue cat": "held-out caption"}
    )
    write_json(vars(sheet), run / "images.json")
    page = read(run)
    boxes = [
        own["viewbox"] for own in page.all("svg") if "chart" not in (own.get("class") or "") and own.get("viewbox")
    ]
    assert boxes == 2 * ["0 0 16 16", "18 0 16 16", "0 18 16 16"]
    assert page.texts["figcaption"] == [
        *("red apple", "a green heart", "rocket not in training"),  # the first has no prompts in its file: the config's
        *("rocket not in training", "red apple", "blue cat held out"),
    ]
    assert [own["title"] for own in page.all("button")] == ["step 10", "step 40"]
    assert [own["data-layout"] for own in page.all("button")] == ["0", "1"]
    assert ["hidden" in own for own in page.all("div") if "data-layout" in own] == [True, False]
    grids = page.all("image")
    assert "href" not in grids[0] and grids[1]["href"] == page.all("img")[1]["src"]
    assert base64.b64decode(grids[1]["href"].split(",")[1]) == (run / "samples" / "step_00000040.png").read_bytes()
    assert "9 training images, 2 held out" in page.texts["small"][0]


def test_a_grid_of_another_size_is_shown_as_a_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_png(Image.new("RGB", (100, 40)), run / "samples" / "step_00000040.png")
    assert {"viewbox": "0 0 100 40"} in read(run).all("svg")
    (run / "config.yaml").unlink()
    page = read(run)
    assert {"viewbox": "0 0 100 40"} in page.all("svg") and page.texts.get("dt") is None


def test_a_model_without_captions_has_samples_without_prompts(tmp_path: Path) -> None:
    run = write_run(tmp_path, STAGE_2, 'validation.prompts=[""]', "validation.num_samples=4")
    write_grid(run, 40, 4, prompts=["", "", "", ""])
    page = read(run)
    assert "figcaption" not in page.texts and {"viewbox": "18 18 16 16"} in page.all("svg")


def test_stage_1(tmp_path: Path) -> None:
    run = write_run(tmp_path, [*STAGE_1, {"step": 40, "published_step": 20}], stage="vae")
    write_grid(run, 40, 8, columns=4)
    report = {"fit": False, "data": "4 images", "checks": [{"reason": "PSNR is 9", "passed": False}]}
    report["checks"].append({"reason": "SSIM is 1", "passed": True})
    write_json(report, run / "vae_report.json")
    write_png(Image.new("RGB", (30, 20)), run / "vae_report.png")
    page = read(run)
    boxes = [
        own["viewbox"] for own in page.all("svg") if "chart" not in (own.get("class") or "") and own.get("viewbox")
    ]
    assert boxes == ["0 0 16 34", "18 0 16 34", "36 0 16 34", "54 0 16 34"]  # originals above reconstructions
    assert page.texts["h2"] == [
        "Reconstructions over time each original above its reconstruction, step 40",
        *(
            f"{name} over the optimiser steps"
            for name in ("Training loss", "MSE of held-out images", "PSNR of held-out images")
        ),
        "The autoencoder: Unfit for stage 2 measured on 4 images",
        "Config keys that differ from the defaults; config.yaml has all",
    ]
    assert page.texts["li"] == ["PSNR is 9", "SSIM is 1"]
    assert "PSNR45.0 dBof held-out images" in page.texts["div"] and "published: step 20" in page.texts["span"]
    assert "pre" not in page.texts  # nothing comes next
    write_json({"fit": True, "data": "4 images"}, run / "vae_report.json")
    assert read(run).texts["pre"] == [f"latentdiff train-unet CONFIG vae={run}"]


def test_state_is_that_of_the_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run", STAGE_2)

    def state() -> str:
        return next(text for text in read(run).texts["b"] if text in ("training", "stopped", "finished"))

    assert state() == "stopped"
    with holding_file(run / LOCK_FILE):
        assert state() == "training"
        # 360 steps of 64 images are left, at 50 images/s.
        assert "step40 / 4000:07:41 left" in Page(run / "index.html").texts["div"]
        # With all that came between the steps: 30 s for ten steps. The first line has the start of the run in it.
        seconds = [{"step": step, "seconds": 999.0 if step == 10 else 30.0} for step in (10, 20, 30, 40)]
        write_run(run, [*STAGE_2, *seconds, {"step": 40, "mfu": 0.283, "peak_memory": 2.5e9}])
        assert state() == "training"
        cards = Page(run / "index.html").texts["div"]
        assert "step40 / 4000:18:00 left" in cards and "memory2.5 GBthe most so far" in cards
        assert "speed50 images/s28% of the device's peak" in cards
    write_run(run, [*STAGE_2, {"step": 40, "published_step": 40}])
    assert state() == "finished"  # a run of a version that wrote no run.json
    assert Page(run / "index.html").texts["pre"] == [f"latentdiff generate '{run}' 'red apple'"]
    write_json({"finished": False}, run / "run.json")
    assert state() == "stopped"


# ----------------------------------------------------------------------------------------------------------------------
# One file, whatever is in it


HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\u2028$title \x1b[31m"


def test_no_text_becomes_html(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "<b>&run",
        STAGE_2,
        f"validation.prompts={json.dumps([HOSTILE])}",
        f"data.constant_caption={json.dumps(HOSTILE)}",
        f"vae={json.dumps(HOSTILE)}",
        "data.caption_column=null",
    )
    write_grid(run, 10, 1)
    write_grid(run, 40, 1, [HOSTILE])
    write_png(Image.new("RGB", (16, 16)), run / "images.png")
    write_json(vars(ContactSheet([HOSTILE], 1, 1, 0, {HOSTILE: HOSTILE})), run / "images.json")
    page = read(run)
    shown = HOSTILE.replace("\u2028", "\\u2028").replace("\x1b", "\\x1b")
    assert page.texts["figcaption"] == [shown] * 2  # both grids have one layout; and the training image
    assert any(shown in text for text in page.texts["small"])
    assert sum("</script><script>alert(1)</script>" in text for text in page.texts["dd"]) == 3  # as YAML
    assert page.texts["title"][0] == page.texts["h1"][0] == "<b>&run"
    scripts = page.texts["script"]
    assert scripts == [resources.files("latentdiff").joinpath("assets", "run_page.js").read_text("utf-8")]
    assert not [key for _, own in page.elements for key in own if key.startswith("on")]
    assert {own["src"][:11] for own in page.all("img")} == {"data:image/"}
    assert "\u2028" not in (run / "index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_and_only_the_pages_own_script_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_grid(run, 40)
    page = read(run)
    for tag, own in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "form", "a")
        for key in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert own.get(key, "#").startswith(("data:image/", "#")), (tag, own)
    text = (run / "index.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and re.findall(r"https?://", text) == []
    policy = [own["content"] for own in page.all("meta") if "http-equiv" in own]
    digest = base64.b64encode(sha256(page.texts["script"][0].encode()).digest()).decode()
    assert policy == [f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_many_large_grids_stay_within_the_size(tmp_path: Path) -> None:
    """Noise, which no format makes small: at most 24 grids, evenly chosen with the newest, as smaller JPEGs."""
    run = write_run(tmp_path, [*STAGE_2, validated(4000, 0.02, 0.0)], "data.size=256", "model.sample_size=64")
    noise = np.random.default_rng(0).integers(0, 256, (514, 514, 3), dtype=np.uint8)
    for step in range(100, 4001, 100):
        write_png(Image.fromarray(np.roll(noise, step, axis=0)), run / "samples" / f"step_{step:08d}.png")
    _shrunk.cache_clear()
    page = read(run)
    steps = [int(own["title"].removeprefix("step ").replace(",", "")) for own in page.all("button")]
    assert len(steps) == 24 and steps[0] == 100 and steps[-1] == 4000 and set(np.diff(steps)) == {100, 200}
    assert {own["src"][:15] for own in page.all("img")} == {"data:image/jpeg"}
    assert 3e6 < (run / "index.html").stat().st_size < 8e6
    assert page.all("image")[0]["width"] == "514"  # the boxes are those of the grid itself
    write_page(run)  # within a run, each grid is made smaller once
    assert _shrunk.cache_info().misses == 24


def test_an_old_page_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    write_page(run)
    old = (run / "index.html").read_bytes()
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        write_page(run)
    write_run(run, [*STAGE_2, validated(50, 0.01, 0.0)])

    def no_replace(*paths: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(os, "replace", no_replace)
        write_page(run)
    assert (run / "index.html").read_bytes() == old
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "index.html", "metrics.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.runs
def test_a_run_shows_its_images_samples_and_end(unet_run: Path, vae_run: Path) -> None:
    page = Page(unet_run / "index.html")
    assert [own["title"] for own in page.all("button")] == ["step 3", "step 6"]
    sheet = json.loads((unet_run / "images.json").read_text(encoding="utf-8"))
    assert (sheet["training"], sheet["held_out"], len(sheet["captions"])) == (20, 4, 16)
    assert page.texts["figcaption"] == [
        *(f"{one} not in training" for one in ("red apple", "rocket")),
        *sheet["captions"],
    ]
    # 16 training images of 16 px, five times as large, four in a row and two pixels apart.
    assert Image.open(unet_run / "images.png").size == (4 * 82 - 2, 4 * 82 - 2)
    assert f"latentdiff generate {unet_run} 'red apple'" in page.texts["pre"]
    # The report of stage 1, of which the run has a copy of its own.
    report = json.loads((vae_run / "vae_report.json").read_text(encoding="utf-8"))
    assert f"The autoencoder: Unfit for stage 2 measured on {report['data']}" in page.texts["h2"]
    assert (unet_run / "vae_report.png").read_bytes() == (vae_run / "vae_report.png").read_bytes()
    assert "6 / 6" in page.texts["b"] and "finished" in page.texts["b"]
    with Image.open(unet_run / "samples" / "step_00000003.png") as image:
        assert json.loads(image.info[PNG_KEY]) == {"prompts": ["red apple", "rocket"]}
    assert "Unfit for stage 2" in (vae_run / "index.html").read_text(encoding="utf-8")


@pytest.mark.runs
def test_a_resumed_run_continues_its_page_and_says_how_it_ends(
    tmp_path: Path, vae_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_unet(tmp_path / "run", vae_run, "train.steps=3")
    assert [own["title"] for own in Page(run / "index.html").all("button")] == ["step 3"]
    run_unet(run, vae_run, "train.steps=6")
    page = Page(run / "index.html")
    assert [own["title"] for own in page.all("button")] == ["step 3", "step 6"]
    assert page.texts["th"][:4] == ["", "0", "3", "6"]
    lines = capsys.readouterr().out.splitlines()[-3:]
    titles = r"(Learning|Stuck at the baseline|Worse than at step \d)"
    assert re.match(rf"verdict: {titles}\. The validation loss ", lines[0])
    assert lines[1:] == [f"page: {run / 'index.html'}", f"next: latentdiff generate {run} 'red apple'"]


@pytest.mark.runs
def test_a_problem_with_the_page_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no page today")

    monkeypatch.setattr(latentdiff.training.run, "write_page", broken)
    monkeypatch.setattr(latentdiff.training.run, "write_contact_sheet", broken)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = run_vae(tmp_path / "run")
    assert [str(one.message) for one in seen if "no page today" in str(one.message)] == [
        "the images for the run's page cannot be written: no page today; training goes on"
    ]
    assert (run / "config.json").is_file() and not (run / "index.html").exists()


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def in_browser(page: Path, folder: Path, script: str = "") -> tuple[str, list[str]]:
    """The page's DOM after `script`, and the lines of its console. The script is allowed by its own digest."""
    text = page.read_text(encoding="utf-8")
    if script:
        digest = base64.b64encode(sha256(script.encode()).digest()).decode()
        text = text.replace("script-src '", f"script-src 'sha256-{digest}' '").replace(
            "</body>", f"<script>{script}</script></body>"
        )
    copy = folder / "copy.html"
    copy.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_slider_and_the_film_strip_choose_the_grid(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step, prompts in ((10, ["one", "two", "three"]), (20, ["four", "five", "six"]), (40, ["one", "two", "three"])):
        write_grid(run, step, prompts=prompts)
    write_page(run)

    def after(script: str) -> tuple[list[str], str | None, list[str | None], str | None]:
        dom, console = in_browser(run / "index.html", tmp_path, script)
        assert console == []
        (tmp_path / "dom.html").write_text(dom, encoding="utf-8")
        page = Page(tmp_path / "dom.html")
        shown = [own for own in page.all("div") if "data-layout" in own and "hidden" not in own]
        assert len(shown) == 1
        pressed = [own["title"] for own in page.all("button", **{"aria-pressed": "true"})]
        grid = next(own for own in page.all("image") if own["id"] == f"grid-{shown[0]['data-layout']}")
        files = {own["src"]: own["alt"] for own in page.all("img")}
        at = [text for text in page.texts["span"] if text.startswith("step ")]
        return at, shown[0]["data-layout"], pressed, files[grid["href"]]

    assert after("") == (["step 40"], "0", ["step 40"], "step 40")
    moved = 'slider.value = 1; slider.dispatchEvent(new Event("input"));'
    assert after(moved) == (["step 20"], "1", ["step 20"], "step 20")
    assert after('document.querySelector(".film button").click();') == (["step 10"], "0", ["step 10"], "step 10")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_runs_nothing_of_a_hostile_page(tmp_path: Path) -> None:
    """And it tells when something is wrong: a script that the page does not allow is reported."""
    hostile = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    run = write_run(tmp_path / "run", STAGE_2, f"validation.prompts={json.dumps([hostile])}")
    write_grid(run, 40, 1)
    write_page(run)
    dom, console = in_browser(run / "index.html", tmp_path)
    assert console == [] and "<title>run</title>" in dom
    page = (run / "index.html").read_text(encoding="utf-8")
    (run / "index.html").write_text(page.replace("</body>", "<script>document.title = 'taken'</script></body>"))
    dom, console = in_browser(run / "index.html", tmp_path)
    assert len(console) == 1 and "Content Security Policy" in console[0] and "<title>run</title>" in dom

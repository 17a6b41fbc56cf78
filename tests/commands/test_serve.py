"""`latentdiff serve`: its pages, what it generates, and what it refuses."""

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from command_line import refusal
from PIL import Image, ImageOps
from scripts import ROOT, run_unet
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

import latentdiff.serving.app as app_module
from latentdiff.config import UNetTrainingConfig, load_config
from latentdiff.data.captioned_images import CaptionedImages, open_images
from latentdiff.formats.files import PNG_KEY
from latentdiff.images import decode, to_images
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.serving.app import MAX_BODY, Guard, create_app, listen
from latentdiff.serving.generating import MAX_PIPELINES, Asked, Pipelines, data_uri, generate
from latentdiff.serving.nearest import COPY, SIDE, TrainingImages
from latentdiff.serving.runs import list_runs, weights_of
from latentdiff.training.unet_model import open_checkpoint

# The tiny model has seen few words.
pytestmark = [pytest.mark.runs, pytest.mark.filterwarnings("ignore:not in any caption")]
CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, unet_run: Path, vae_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("served") / "saved"
    shutil.copytree(unet_run, folder / "demo")
    shutil.copytree(vae_run, folder / "a vae")
    (folder / "no run").mkdir()
    (folder / "notes.txt").write_text("mine")
    return folder


def open_client(folder: Path) -> TestClient:
    return TestClient(create_app(folder, CPU), base_url="http://127.0.0.1:7860", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(saved: Path) -> Iterator[TestClient]:
    with open_client(saved) as client:
        yield client


@pytest.fixture(scope="module")
def training(saved: Path) -> CaptionedImages:
    config = load_config(UNetTrainingConfig, saved / "demo" / "config.yaml")
    return open_images(config.data, 3, config.train.seed, progress=False)[0]


def asked(client: TestClient, **values: Any) -> dict[str, Any]:
    answer = client.post("/run/demo/generate", json=values)
    assert answer.status_code == 200, answer.text
    return answer.json()


def image_in(uri: str) -> Image.Image:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return decode({"bytes": base64.b64decode(content), "path": None})


def assert_same(one: Image.Image, other: Image.Image) -> None:
    assert one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def files_in(folder: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def test_the_runs_are_listed(client: TestClient) -> None:
    text = client.get("/").text
    assert re.findall(r'href="([^"]+)"', text) == ["/run/a%20vae", "/run/demo"]
    assert "finished, step 6" in text and "stage 1, the autoencoder" in text and "<script" not in text


def test_a_page_is_the_runs_own_with_a_panel_and_as_strict_a_policy(client: TestClient, saved: Path) -> None:
    page = client.get("/run/demo").text
    for text in re.findall(r"<h2>([^<]+)", (saved / "demo" / "index.html").read_text(encoding="utf-8")):
        assert f"<h2>{text}" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and "Try it" in scripts[0] and "Samples over time" in scripts[0]
    allowed = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'"
    assert re.findall(r'Policy" content="([^"]+)"', page) == [f"default-src 'none'; {allowed}"]
    assert re.findall(r'<option value="([^"]*)">', page)[:3] == ["published", "6", "3"]
    assert not re.search(r"https?://|@import|url\(| on[a-z]+=", page)
    autoencoder = client.get("/run/a%20vae").text
    assert "no weights that generate images" in autoencoder and "connect-src" not in autoencoder
    assert client.post("/run/a%20vae/generate", json={}).json() == {
        "error": "a vae has no weights that generate images yet"
    }


def test_headers(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/run/none"), client.get("/", headers={"host": "evil.com"})):
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_a_published_model_alone_has_a_page(tmp_path: Path, saved: Path) -> None:
    left_out = shutil.ignore_patterns("metrics.jsonl", "run.json", "samples", "checkpoints", "images.*", "index.html")
    shutil.copytree(saved / "demo", tmp_path / "model", ignore=left_out)
    (tmp_path / "model" / "trained_on.json").unlink()
    page = open_client(tmp_path / "model").get("/run/model").text
    assert "<h2>Try it" in page and "Nothing measured" not in page and "<b>finished</b>" in page


def test_a_run_of_pixels_without_captions_has_no_prompt(tmp_path: Path) -> None:
    channels = ["model.in_channels=3", "model.out_channels=3", "train.steps=3", "train.caption_dropout=1.0"]
    channels += ["validation.guidance_scale=1"]
    run = run_unet(tmp_path / "pixels", Path("none"), "vae=null", 'validation.prompts=[""]', *channels)
    with open_client(tmp_path) as client:
        assert '<label class="wide" hidden>Prompt' in client.get("/run/pixels").text
        made = client.post("/run/pixels/generate", json={"seed": 1}).json()
        assert_same(
            image_in(made["image"]), LatentDiffusionPipeline.from_pretrained(run)("", seed=1, progress=False)[0]
        )
        assert client.post("/run/pixels/nearest", json={"image": made["image"]}).json()["distance"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# Generating


def test_an_image_is_the_pipelines_own(client: TestClient, saved: Path, training: CaptionedImages) -> None:
    prompt = training.captions[0]
    before = files_in(saved)
    options = {"sampler": "euler", "num_inference_steps": 4, "guidance_scale": 2.5}
    made = asked(client, prompt=prompt, seed=5, **options)
    pipeline = LatentDiffusionPipeline.from_pretrained(saved / "demo")
    expected = pipeline(prompt, seed=5, progress=False, **options)[0]
    image = image_in(made["image"])
    assert_same(image, expected)
    assert made["seed"] == 5 and made["weights"] == "published" and made["notes"] == []
    assert made["settings"] == json.loads(expected.info[PNG_KEY])
    assert {**options, "prompt": prompt, "seed": 5}.items() <= made["settings"].items()
    random = asked(client, prompt="rocket zebra")  # the model's own defaults, and a seed that repeats it
    assert "zebra" in random["notes"][0]
    again = asked(client, prompt="rocket zebra", seed=random["seed"])
    assert again["image"] == random["image"] and random["settings"]["num_inference_steps"] == 3
    assert files_in(saved) == before


def test_the_weights_of_a_checkpoint(client: TestClient, saved: Path) -> None:
    assert weights_of(saved / "demo") == ["published", "6", "3"]
    images = {weights: asked(client, prompt="rocket", seed=2, weights=weights) for weights in ("published", "6", "3")}
    for weights in ("6", "3"):
        pipeline = open_checkpoint(saved / "demo" / "checkpoints" / f"step_0000000{weights}")
        assert_same(image_in(images[weights]["image"]), pipeline("rocket", seed=2, progress=False)[0])
        assert images[weights]["weights"] == weights
    assert images["3"]["image"] != images["6"]["image"]


def test_a_run_without_a_pipeline_starts_with_its_newest_checkpoint(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved / "demo", tmp_path / "run", ignore=shutil.ignore_patterns("model_index.json"))
    made = generate(Pipelines(CPU), tmp_path / "run", Asked(prompt="rocket", seed=2), lambda: None)
    assert made["weights"] == "6"


def test_few_pipelines_are_kept_and_a_changed_one_is_opened_again(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(saved / "demo", tmp_path / "run")
    pipelines = Pipelines(CPU)
    first = pipelines.get(run, "published")
    assert pipelines.get(run, "3") is not first and pipelines.get(run, "published") is first
    pipelines.get(run, "6")
    assert len(pipelines) == MAX_PIPELINES == 2 and pipelines.get(run, "published") is first  # "3" had to go
    os.utime(run / "model_index.json", ns=(1, 1))
    assert pipelines.get(run, "published") is not first


def test_image_to_image(client: TestClient, saved: Path) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    made = asked(client, prompt="rocket", seed=1, image=data_uri(start), strength=0.5)
    pipeline = LatentDiffusionPipeline.from_pretrained(saved / "demo")
    expected = pipeline.image_to_image("rocket", start, 0.5, height=16, width=16, seed=1, progress=False)[0]
    assert_same(image_in(made["image"]), expected)
    assert made["image"] != asked(client, prompt="rocket", seed=1)["image"]


# ----------------------------------------------------------------------------------------------------------------------
# The nearest training image


def nearest(client: TestClient, image: Image.Image) -> dict[str, Any]:
    answer = client.post("/run/demo/nearest", json={"image": data_uri(image)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_training_image_is_a_copy_of_itself(client: TestClient, training: CaptionedImages) -> None:
    image = to_images(training.pixels(7)[None])[0]
    found = nearest(client, image)
    assert_same(image_in(found["image"]), image)
    assert found["caption"] == training.captions[7]
    assert found["distance"] == 0 and found["copy"] is True and found["compared"] == found["total"] == 20


def test_distances_and_the_rule_of_copies(client: TestClient, training: CaptionedImages) -> None:
    """Against a search over all images in double precision, on the way from one training image to its nearest."""
    images = to_images(torch.stack([training.pixels(i) for i in range(len(training))]))

    def values(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)

    everything = np.stack(list(map(values, images)))
    copies = []
    for part in (0.02, 0.1, 0.3, 0.45):
        image = Image.blend(images[3], images[11], part)
        distances = np.sqrt(np.square(everything - values(image)).mean(axis=(1, 2, 3)))
        best, second = np.sort(distances)[:2]
        found = nearest(client, image)
        assert_same(image_in(found["image"]), images[int(distances.argmin())])
        assert found["distance"] == pytest.approx(best) and found["second"] == pytest.approx(second)
        assert found["copy"] == (best < second / 3)
        copies.append(found["copy"])
    assert copies[0] is True and copies[-1] is False and COPY == 1 / 3


def test_images_that_are_there_twice_or_mirrored(training: CaptionedImages) -> None:
    """The second nearest differs from the nearest; with flips, the mirror image counts."""
    twice = TrainingImages(training.select([4, 4, 9]))
    image = to_images(training.pixels(4)[None])[0]
    found = twice.nearest(image)
    assert found.distance == 0 and found.second is not None and found.second > 5 and found.is_copy
    assert TrainingImages(training.select([4, 4])).nearest(image).is_copy is None
    mirrored = ImageOps.mirror(image)
    assert twice.nearest(mirrored).distance > 0
    flipping = training.select([4, 9])
    flipping.config = training.config.model_copy(update={"flip": 0.5})
    assert TrainingImages(flipping).nearest(mirrored).distance == 0


def test_data_that_is_gone(tmp_path: Path, saved: Path) -> None:
    run = shutil.copytree(saved / "demo", tmp_path / "demo")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("source: embedded", "source: /gone", 1), encoding="utf-8")
    with open_client(tmp_path) as client:
        found = nearest(client, Image.new("RGB", (16, 16)))
    assert list(found) == ["unknown"] and re.match(r"The training images cannot be opened: .*/gone", found["unknown"])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": 3}, "request: prompt"),
        ({"prompt": "x" * 2001}, "request: prompt"),
        ({"seed": "3"}, "request: seed"),
        ({"seed": -1}, "request: seed"),
        ({"seed": [1, 2]}, "request: seed"),
        ({"steps": 3}, "request: "),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001, must be in 1 .. 1000"),
        ({"num_inference_steps": True}, "request: num_inference_steps"),
        ({"guidance_scale": float("inf")}, "request: guidance_scale"),
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
        ({"weights": "4"}, "weights are '4', must be one of published, 6, 3"),
        ({"weights": "../../a vae"}, "weights are '../../a vae', must be one of published, 6, 3"),
        ({"image": "/etc/passwd"}, "image must be a data URI in base64"),
        ({"image": "data:image/png;base64,###"}, "image is not valid base64"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "the image cannot be read: not an image of a known format"),
        ({"strength": 1.5}, "request: strength"),
        ([1], "the request must be a JSON object"),
    ],
)
def test_a_bad_request_is_one_line(client: TestClient, values: Any, message: str) -> None:
    content = json.dumps(values)
    answer = client.post("/run/demo/generate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert error.startswith(message) and "\n" not in error and "Traceback" not in error


def test_what_is_no_json_or_too_much_of_it(client: TestClient) -> None:
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 100_000, b"\xff"):
        answer = client.post("/run/demo/generate", content=content, headers=json_type)
        assert (answer.status_code, answer.json()) == (400, {"error": "the request is not JSON"})
    form = client.post("/run/demo/generate", data={"prompt": "x"})
    assert (form.status_code, form.json()) == (400, {"error": "the request must have the type application/json"})
    too_long = {"error": "the request has more than 20,000,000 bytes"}
    answer = client.post("/run/demo/generate", content=b" " * (MAX_BODY + 1), headers=json_type)
    assert (answer.status_code, answer.json()) == (400, too_long)
    read = []

    def endless() -> Iterator[bytes]:  # of a length that is not announced
        for _ in range(50):
            read.append(1)
            yield b" " * 1_000_000

    answer = client.post("/run/demo/generate", content=endless(), headers=json_type)
    assert (answer.status_code, answer.json()) == (400, too_long)


@pytest.mark.parametrize(
    "path",
    [
        "/run/../../etc/passwd",
        "/run/..%2F..%2Fetc%2Fpasswd",
        "/run/%2e%2e",
        "/run/..",
        "/run/.",
        "/run//etc/passwd",
        "/run/%2Fetc%2Fpasswd",
        "/run/demo%2Fsamples",
        "/run/demo/config.yaml",
        "/run/demo%00",
        "/run/%00",
        "/run/no%20run",
        "/run/notes.txt",
        "/run/..%5c..%5cetc",
        "/run/%252e%252e",
        "/notes.txt",
    ],
)
def test_no_path_leaves_the_listing(client: TestClient, path: str) -> None:
    """The paths as they stand, which a client would tidy up."""
    status, body = raw(client.app, "GET", path)
    assert status == 404 and list(json.loads(body)) == ["error"]
    assert raw(client.app, "POST", f"{path}/generate", b"{}")[0] in (404, 405)


def raw(app: Any, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Status and body of a request whose path is taken as it is."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope_of(method, path, **headers), receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def scope_of(method: str, path: str, **headers: str) -> dict[str, Any]:
    fields = {"host": "127.0.0.1:7860", "content-type": "application/json"} | headers
    return {
        "type": "http",
        "method": method,
        "path": urllib.request.unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 7860),
    }


def test_links_that_leave_the_folder_are_left_out(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(saved / "demo", folder / "fine")
    shutil.copytree(saved / "demo", folder / "leaking", ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "alias").symlink_to(folder / "fine")
    (folder / "outside").symlink_to(saved / "demo")
    (folder / "leaking" / "samples" / "step_00000001.png").symlink_to(saved / "notes.txt")
    (folder / "fine" / "loop").symlink_to(folder)  # within the folder, but it leads to one that leaves it
    listing = list_runs(folder)
    assert listing.runs == {} and listing.left_out == ["alias", "fine", "leaking", "outside"]
    (folder / "fine" / "loop").unlink()
    (folder / "fine" / "self").symlink_to(folder / "fine" / "samples")
    listing = list_runs(folder)
    assert list(listing.runs) == ["alias", "fine"] and listing.left_out == ["leaking", "outside"]
    with open_client(folder) as client:
        assert client.get("/run/outside").status_code == client.get("/run/leaking").status_code == 404
        assert "leaves this folder: leaking, outside" in client.get("/").text


def test_only_this_machine_and_only_its_own_pages(client: TestClient) -> None:
    for host in ("evil.com", "127.0.0.1.evil.com", "evil.com:7860", "localhost@evil.com", "192.168.0.2", "", "[::1"):
        assert raw(client.app, "GET", "/", host=host)[0] == 400
    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:7860"):
        assert raw(client.app, "GET", "/", host=host)[0] == 200
    refused = b'{"error":"only this server\'s own pages may ask for this"}'
    for headers in (
        {"origin": "http://evil.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "https://127.0.0.1:7860"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        assert raw(client.app, "POST", "/run/demo/generate", b'{"seed": 1}', **headers) == (400, refused)
    own = {"origin": "http://127.0.0.1:7860", "sec_fetch_site": "same-origin"}
    assert client.post("/run/demo/generate", json={"prompt": "rocket"}, headers=own).status_code == 200


def test_a_wildcard_address_is_reached_by_any_address_but_no_name() -> None:
    async def nothing(*_: Any) -> None:
        pass

    def ours(host: str, *hosts: str) -> bool:
        return Guard(nothing, hosts)._is_ours(host)

    assert ours("192.168.0.2:7860", "localhost", "0.0.0.0") and ours("[fe80::1]:7860", "localhost", "::")
    assert not ours("evil.com:7860", "localhost", "0.0.0.0") and not ours("192.168.0.2", "localhost", "192.168.0.3")


# ----------------------------------------------------------------------------------------------------------------------
# Several clients


def waiting_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_generation_at_a_time_while_pages_are_served(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, running, most = threading.Event(), [], []

    def slow(_pipelines: Any, _run: Path, asked: Asked, _check: Any) -> dict[str, Any]:
        running.append(asked.seed)
        most.append(len(running))
        assert release.wait(20)
        running.remove(asked.seed)
        return {"seed": asked.seed}

    monkeypatch.setattr(app_module, "generate", slow)
    answers: dict[int, Any] = {}
    with open_client(saved) as client:

        def ask(seed: int) -> None:
            answers[seed] = client.post("/run/demo/generate", json={"seed": seed}).json()

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        waiting_for(lambda: bool(running))
        assert client.get("/run/demo").status_code == 200 and answers == {}
        release.set()
        for thread in threads:
            thread.join(20)
    assert answers == {1: {"seed": 1}, 2: {"seed": 2}} and most == [1, 1]


def test_two_clients_get_their_own_images(client: TestClient, saved: Path) -> None:
    images: dict[int, Image.Image] = {}

    def ask(seed: int) -> None:
        images[seed] = image_in(asked(client, prompt="rocket", seed=seed)["image"])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pipeline = LatentDiffusionPipeline.from_pretrained(saved / "demo")
    for seed in (1, 2, 3):
        assert_same(images[seed], pipeline("rocket", seed=seed, progress=False)[0])


def test_whoever_leaves_loses_the_place_and_stops_what_has_begun(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = [], []
    leave = {seed: asyncio.Event() for seed in (1, 2, 3, 4)}

    def slow(_pipelines: Any, _run: Path, asked: Asked, check: Callable[[], None]) -> dict[str, Any]:
        begun.append(asked.seed)
        try:
            while asked.seed in (1, 4):
                check()
                time.sleep(0.005)
        finally:
            ended.append(asked.seed)
        return {"seed": asked.seed}

    monkeypatch.setattr(app_module, "generate", slow)
    app = create_app(saved, CPU)

    async def request(seed: int) -> list[Any]:
        sent: list[Any] = []
        body = iter([{"type": "http.request", "body": json.dumps({"seed": seed}).encode(), "more_body": False}])

        async def receive() -> Any:
            for message in body:
                return message
            await leave[seed].wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope_of("POST", "/run/demo/generate"), receive, send)
        return sent

    async def everything() -> list[Any]:
        first = asyncio.create_task(request(1))
        while not begun:
            await asyncio.sleep(0.01)
        second, third = asyncio.create_task(request(2)), asyncio.create_task(request(3))
        await asyncio.sleep(0.1)
        leave[2].set()
        assert (await asyncio.wait_for(second, 20))[0]["status"] == 499 and begun == [1]
        leave[1].set()
        await asyncio.wait_for(first, 20)
        answer = await asyncio.wait_for(third, 20)
        last = asyncio.create_task(request(4))
        while 4 not in begun:
            await asyncio.sleep(0.01)
        last.cancel()  # as a server does that ends
        return [*answer, *await asyncio.wait_for(last, 20)]

    answer = asyncio.run(everything())
    assert answer[0]["status"] == 200 and json.loads(answer[1]["body"]) == {"seed": 3}
    assert answer[2]["status"] == 503 and json.loads(answer[3]["body"]) == {"error": "the server has been stopped"}
    waiting_for(lambda: 4 in ended)
    assert begun == ended == [1, 3, 4]


def test_a_generation_that_nobody_waits_for_ends_at_its_next_step(saved: Path) -> None:
    steps = []

    def check() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        generate(Pipelines(CPU), saved / "demo", Asked(prompt="rocket", num_inference_steps=50), check)
    assert len(steps) == 3


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_wrong_usage(saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none is not a folder" in refusal(capsys, "serve", str(saved / "none"), "--device", "cpu")
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        error = refusal(capsys, "serve", str(saved), "--port", str(port), "--device", "cpu")
    assert error.startswith(f"error: --host 127.0.0.1 --port {port} cannot be listened at: ") and error.count("\n") == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert refusal(capsys, "serve", str(saved)) == (
        'error: the live page needs Starlette and uvicorn: pip install "latentdiff[serve]"\n'
    )


def test_the_command_serves_until_it_is_interrupted(saved: Path) -> None:
    command = [sys.executable, "-m", "latentdiff", "serve", str(saved), "--port", "0", "--host", "0.0.0.0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"http://0\.0\.0\.0:(\d+) shows the runs of {saved} \(Ctrl-C to stop\)\n", line)
        assert found is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/", timeout=20) as answer:
            assert b'href="/run/demo"' in answer.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert errors == "warning: whoever can reach 0.0.0.0 can see these runs and generate images here\n"
    assert process.returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

DRIVER = """
document.getElementById("prompt").value = "red apple";
document.getElementById("seed").value = "5";
document.getElementById("go").click();
const watch = setInterval(() => {
  const [made, near] = [document.getElementById("image"), document.getElementById("nearest")];
  if (!made.naturalWidth || near.hidden) return;
  clearInterval(watch);
  document.title = `${made.naturalWidth} ${near.naturalWidth}`;
  fetch("/seen", { method: "POST", body: document.documentElement.outerHTML });
}, 20);
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_panel_in_a_browser(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page tells what it shows once it shows it: Chromium's virtual time may end before the server has answered."""
    asset = app_module._asset
    monkeypatch.setattr(app_module, "_asset", lambda name: asset(name) + (DRIVER if name == "try_it.js" else ""))
    served, pages = create_app(saved, CPU), Queue[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/seen":
            await served(scope, receive, send)
            return
        pages.put((await Request(scope, receive).body()).decode())
        await Response()(scope, receive, send)

    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/run/demo"
    log = tmp_path / "chromium.log"
    with log.open("w") as stream:
        browser = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", url], stdout=stream, stderr=stream
        )
    try:
        page = pages.get(timeout=120)
    except Empty:
        pytest.fail(f"the page has shown no image: {log.read_text()}")
    finally:
        browser.terminate()
        browser.wait(20)
        server.should_exit = True
        thread.join(20)
    assert [line for line in log.read_text().splitlines() if "CONSOLE" in line] == []
    assert "<title>16 16</title>" in page and "seed 5 · " in page
    shown = re.search(r'<img id="image"[^>]* src="([^"]+)"', page)
    assert shown is not None
    expected = LatentDiffusionPipeline.from_pretrained(saved / "demo")("red apple", seed=5, progress=False)[0]
    assert_same(image_in(shown[1]), expected)

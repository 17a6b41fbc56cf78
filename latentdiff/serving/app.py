"""The live page: a web application that shows the runs of a folder and generates with their weights.

Its only input is a run's name, which is looked up, and JSON; it writes no file. Whoever can reach it can generate, so
it is for one machine: it answers only requests that name this machine, and only its own pages can start a generation.
"""

import asyncio
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from threading import Event
from typing import Any
from urllib.parse import quote, urlsplit

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.config import UNetTrainingConfig, load_run_config, validated
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.pipeline.trained_on import TrainedOn
from latentdiff.printable import cut, first_line, printable
from latentdiff.serving.generating import MAX_PROMPT, Asked, Pipelines, data_uri, generate, read_image
from latentdiff.serving.nearest import TrainingSets
from latentdiff.serving.runs import PUBLISHED, list_runs, weights_of
from latentdiff.training.run_page import Addition, served_page, standing

MAX_BODY = 20_000_000  # bytes of a request
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")  # all addresses of this machine
# What the pages' own policy, in their <meta>, cannot say or leaves out.
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ClientGone(Exception):
    """Whoever asked no longer waits for the answer."""


class Guard:
    """Refuses requests that name another host, or that another site sends; adds the headers.

    A page of another site whose name has been pointed at this machine (DNS rebinding) still sends its own name as the
    host. hosts: the names that count; with a wildcard among them any IP address does, which no rebinding can use.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.any_address = not self.hosts.isdisjoint(WILDCARDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        refusal = self._refusal(Request(scope))
        answer = self.app if refusal is None else _error(refusal)
        await answer(scope, receive, with_headers)

    def _refusal(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return "the Host header names another machine than this server's"
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            if origin is not None and origin.lower() != f"http://{host.lower()}":
                return "only this server's own pages may ask for this"
            if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return "only this server's own pages may ask for this"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = "" if "@" in host else (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address


def create_app(folder: Path, device: torch.device, hosts: Sequence[str] = LOCAL_NAMES) -> Starlette:
    """The application. folder: of the runs, or a run. hosts: the names of this machine in requests.

    Raises ValueError if it is no folder.
    """
    list_runs(folder)
    served = _Server(folder, Pipelines(device))
    return Starlette(
        routes=[
            Route("/", served.index, methods=["GET"]),
            Route("/run/{name}", served.page, methods=["GET"]),
            Route("/run/{name}/generate", served.generate, methods=["POST"]),
            Route("/run/{name}/nearest", served.nearest, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers=dict.fromkeys((HTTPException, ValueError, OSError, ClientGone, Exception), _failed),
        lifespan=served.lifespan,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; ValueError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened at: {first_line(error)}") from None


class _Server:
    """What answers. One thread generates, another one compares with training images; both have a queue."""

    def __init__(self, folder: Path, pipelines: Pipelines) -> None:
        self.folder = folder
        self.pipelines = pipelines
        self.training_sets = TrainingSets()
        self.generating = ThreadPoolExecutor(1, "generating")
        self.comparing = ThreadPoolExecutor(1, "comparing")

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        for worker in (self.generating, self.comparing):
            worker.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Pages

    async def index(self, _request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(self._index))

    async def page(self, request: Request) -> Response:
        run = await run_in_threadpool(self._run, request.path_params["name"])
        return HTMLResponse(await run_in_threadpool(lambda: served_page(run, _try_it(run))))

    def _run(self, name: str) -> Path:
        run = list_runs(self.folder).runs.get(name)
        if run is None:
            raise HTTPException(404, "there is no such run")
        return run

    def _index(self) -> str:
        listing = list_runs(self.folder)
        items = "".join(_row(name, run) for name, run in listing.runs.items())
        if not items:
            items = "<li>No runs yet. A run is listed once it has begun.</li>"
        if listing.left_out:
            names = _text(", ".join(listing.left_out))
            items += f'<li class="dim">Left out, since a link in them leaves this folder: {names}</li>'
        template = Template(_asset("runs.html"))
        return template.substitute(title=_text(self.folder.resolve().name), folder=_text(self.folder), runs=items)

    # ------------------------------------------------------------------------------------------------------------------
    # Work

    async def generate(self, request: Request) -> Response:
        run = await run_in_threadpool(self._run, request.path_params["name"])
        asked = validated(Asked, await _json(request), "request")

        def work(check: Callable[[], None]) -> dict[str, Any]:
            return generate(self.pipelines, run, asked, check)

        return JSONResponse(await _in_turn(request, self.generating, work))

    async def nearest(self, request: Request) -> Response:
        run = await run_in_threadpool(self._run, request.path_params["name"])
        values = await _json(request)
        if values.keys() != {"image"} or not isinstance(values["image"], str):
            raise ValueError("request: must have the key image alone, a data URI")

        def work(check: Callable[[], None]) -> dict[str, Any]:
            image = read_image(values["image"])
            check()
            try:
                training = self.training_sets.get(run)
                found = training.nearest(image)
            except (ValueError, OSError) as error:
                return {"unknown": f"The training images cannot be opened: {first_line(error)}"}
            return {
                "image": data_uri(found.image),
                "caption": found.caption,
                "distance": found.distance,
                "second": found.second,
                "copy": found.is_copy,
                "compared": len(training),
                "total": training.total,
            }

        return JSONResponse(await _in_turn(request, self.comparing, work))


async def _in_turn(
    request: Request, worker: ThreadPoolExecutor, work: Callable[[Callable[[], None]], dict[str, Any]]
) -> dict[str, Any]:
    """What `work` returns, in the worker's queue; ClientGone as soon as the client leaves.

    Then it loses its place in the queue; if it has begun, the function that `work` is given raises.
    """
    stop = Event()

    def check() -> None:
        if stop.is_set():
            raise ClientGone

    result = asyncio.wrap_future(worker.submit(work, check))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientGone
        return result.result()
    except asyncio.CancelledError:  # the server ends
        raise HTTPException(503, "the server has been stopped") from None
    finally:
        stop.set()
        result.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    """Return when the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> dict[str, Any]:
    """The request's JSON object; ValueError for anything else, and for too many bytes before they are read."""
    # A form of another site cannot have this type without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ValueError("the request must have the type application/json")
    body = bytearray()
    announced = request.headers.get("content-length", "0")
    too_long = ValueError(f"the request has more than {MAX_BODY:,} bytes")
    if not announced.isascii() or not announced.isdigit() or len(announced) > 15 or int(announced) > MAX_BODY:
        raise too_long
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise too_long
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("the request must be a JSON object")
    return values


async def _failed(_request: Request, error: Exception) -> Response:
    """The answer in place of what an error prevented."""
    if isinstance(error, HTTPException):
        return _error(error.detail, error.status_code)
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, ValueError | OSError):
        return _error(str(error))
    return _error(first_line(error), 500)


def _error(text: str, status: int = 400) -> JSONResponse:
    line = cut(printable("; ".join(text.splitlines())))
    return JSONResponse({"error": line}, status)


# ----------------------------------------------------------------------------------------------------------------------
# HTML


def _asset(name: str) -> str:
    return resources.files("latentdiff").joinpath("assets", name).read_text("utf-8")


def _text(value: object) -> str:
    return escape(printable(str(value)).replace("\n", " "))


def _row(name: str, run: Path) -> str:
    try:
        how = standing(run)
        state = f"{how.state}, step {how.step:,}" if how.step else how.state
        about, verdict = _text(how.about), _text(how.verdict)
    except (ValueError, OSError) as error:
        state, about, verdict = "cannot be read", _text(first_line(error)), ""
    return (
        f'<li><a href="/run/{_text(quote(name, safe="", errors="surrogateescape"))}"><b>{_text(name)}</b>'
        f"<span>{state}</span><small>{about}</small><small>{verdict}</small></a></li>"
    )


def _try_it(run: Path) -> Addition:
    """The panel that generates with a run's weights; a line in its place where it has none."""
    weights = weights_of(run)
    config = load_run_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    usual = config.validation if isinstance(config, UNetTrainingConfig) else None
    trained_on = TrainedOn.load(run)
    content = '<p class="dim">This run has no weights that generate images (yet).</p>'
    if weights:
        content = Template(_asset("try_it.html")).substitute(
            hidden="" if trained_on is None or trained_on.captions else " hidden",
            prompt=_text(usual.prompts[0] if usual is not None and usual.prompts else ""),
            longest=MAX_PROMPT,
            steps="" if usual is None else usual.num_inference_steps,
            guidance="" if usual is None else f"{usual.guidance_scale:g}",
            samplers=_options({"": "the model's own", **{name: name for name in SAMPLERS}}),
            weights=_options({one: one if one == PUBLISHED else f"step {int(one):,}" for one in weights}),
        )
    panel = f'<section class="panel" id="try"><h2>Try it <a href="/">all runs</a></h2>{content}</section>'
    script = _asset("try_it.js") if weights else ""
    return Addition(panel, _asset("try_it.css"), script, "; connect-src 'self'" if weights else "")


def _options(names: dict[str, str]) -> str:
    return "".join(f'<option value="{_text(value)}">{_text(name)}</option>' for value, name in names.items())

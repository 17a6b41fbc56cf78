"""`latentdiff serve`."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import DeviceOption


def serve(
    saved: Annotated[Path, typer.Argument(metavar="SAVED", help="Folder of the runs, or one run.")] = Path("saved"),
    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine can connect.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: DeviceOption = None,
) -> None:
    """Serve the live pages of runs: each run's page, with a panel that generates images."""
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise ValueError('the live page needs Starlette and uvicorn: pip install "latentdiff[serve]"')
    import uvicorn

    from latentdiff.devices import choose_device
    from latentdiff.serving.app import LOCAL_NAMES, create_app, listen

    app = create_app(saved, choose_device(device), (*LOCAL_NAMES, host))
    with listen(host, port) as listening:
        if host not in LOCAL_NAMES:
            print(f"warning: whoever can reach {host} can see these runs and generate images here", file=sys.stderr)
        place = f"[{host}]" if ":" in host else host
        print(f"http://{place}:{listening.getsockname()[1]} shows the runs of {saved} (Ctrl-C to stop)", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, limit_concurrency=100, timeout_graceful_shutdown=1, ws="none"
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # the usual end
            pass

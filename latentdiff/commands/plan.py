"""`latentdiff plan`: what a training will take, before it is started."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.commands.common import DeviceOption, NoProgress


def plan(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Config of a stage, or a folder with those of both.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.key=value", help="Config values, with one CONFIG.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Time some steps on this machine, which takes a few seconds.")] = True,
    device: DeviceOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Say what a training will take: parameters, FLOPs, memory, disk and, measured on this machine, time.

    With --no-measure nothing is computed, so the config of a GPU can be planned without it.
    """
    from latentdiff.config import UNetTrainingConfig, VAETrainingConfig, load_config, stage_of
    from latentdiff.devices import choose_device
    from latentdiff.models.initial_model import with_initial_model
    from latentdiff.recipes import no_config
    from latentdiff.training.plan import duration
    from latentdiff.training.plan import plan as plan_of

    if not config.exists():
        raise ValueError(no_config(config))
    files = [config]
    if config.is_dir():
        files = [file for file in (config / "vae.yaml", config / "unet.yaml") if file.is_file()]
        if not files:
            raise ValueError(f"{config} has neither vae.yaml nor unet.yaml")
        if overrides:
            raise ValueError(f"{overrides[0]!r} may be of either stage of {config}; name the config of one")
    total = 0.0
    for file in files:
        stage = stage_of(file)
        kind = UNetTrainingConfig if stage == "unet" else VAETrainingConfig
        completing = with_initial_model if stage == "unet" else None
        loaded = load_config(kind, file, overrides or [], completing)
        found = plan_of(file, loaded, choose_device(device), measure, progress=not no_progress)
        print(f"stage {2 if stage == 'unet' else 1}, {file}")
        print(found.text())
        total += found.total_seconds
    if len(files) > 1 and measure:
        print(f"both stages: about {duration(total)}")

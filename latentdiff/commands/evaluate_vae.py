"""`latentdiff evaluate-vae`."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentdiff.commands.common import DeviceOption, LogOption, NoProgress, append_to_log, with_option_groups


class Metric(StrEnum):
    """What --metrics may name; typer takes no list of literals."""

    LPIPS = "lpips"
    FID = "fid"
    KID = "kid"


@dataclass(frozen=True)
class Limits:
    """The thresholds of the verdict; the fields are those of `latentdiff.evaluation.autoencoder.Thresholds`."""

    min_psnr: Annotated[float, typer.Option(help="Lowest PSNR of the reconstructions, dB.")] = 22.0
    min_ssim: Annotated[float, typer.Option(help="Lowest SSIM of the reconstructions.")] = 0.6
    max_dead_channels: Annotated[float, typer.Option(help="Highest fraction of unused latent channels.")] = 0.25
    max_scale_error: Annotated[
        float, typer.Option(help="Largest error of the latents' mean and standard deviation.")
    ] = 0.2
    max_noise_loss: Annotated[float, typer.Option(help="Largest loss of PSNR by noise of 0.1 on the latents, dB.")] = (
        3.0
    )


@with_option_groups
def evaluate_vae(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run of stage 1; the folder, single file or hub id of a pipeline or autoencoder."
        ),
    ],
    limits: Limits,
    config: Annotated[
        Path | None, typer.Option(help="Config with the data to measure on (default: RUN/config.yaml).")
    ] = None,
    split: Annotated[
        Literal["held-out", "training"] | None, typer.Option(help="Images to measure on (default: held-out, if any).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images measured at once.")] = 16,
    device: DeviceOption = None,
    metrics: Annotated[
        list[Metric] | None,
        typer.Option(help="Metrics by pretrained networks, which are downloaded."),
    ] = None,
    log: LogOption = None,
    no_progress: NoProgress = False,
) -> None:
    """Measure an autoencoder and say whether it is fit for stage 2.

    Writes vae_report.json, vae_report.png and latent_preview.json into its folder, if it is one.
    """
    from latentdiff.evaluation.autoencoder import Thresholds, evaluate_run

    result = evaluate_run(
        run,
        Thresholds(**asdict(limits)),
        config=config,
        split=split,
        batch_size=batch_size,
        device=device,
        metrics=[metric.value for metric in metrics or []],
        progress=not no_progress,
    )
    print(result.text(), "", *result.files, sep="\n")
    if log is not None:
        append_to_log(log, ["latentdiff", "evaluate-vae", str(run)], result.text())

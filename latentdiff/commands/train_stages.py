"""`latentdiff train-vae` and `latentdiff train-unet`: the training scripts as commands."""

from typing import Any

from latentdiff.training.arguments import Stage, parse_arguments

# The scripts read their own command line.
AS_GIVEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train_stage(stage: Stage, arguments: list[str]) -> None:
    """Run a training script on a command line; --help is answered without importing it, which takes seconds."""
    name = f"latentdiff train-{stage}"
    parse_arguments(arguments, stage, name)
    if stage == "vae":
        import train_vae as script
    else:
        import train_unet as script
    script.main(arguments)

"""The two training scripts with tiny variants of the demo's own configs: in this process, in others, in several."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_unet
import train_vae
from latentdiff.config import VAETrainingConfig, load_config

ROOT = Path(train_vae.__file__).parent
# The plain embedded set, of which any number of images can be held out, and whole images.
EMBEDDED = ["data.source=embedded", "data.validation_split=null", "data.validation_limit=null"]
WHOLE = ["train.crop_size=null", "train.whole_image_steps=0"]
QUIET = ["logging.progress=false", "train.precision=fp32", "data.size=16", "logging.every=1", *EMBEDDED]
# Muon works in bf16, so with another order of summation its curves drift apart.
ADAMW = ["optimizer.kind=adamw"]
# The demo's configs, made tiny: the same keys, the same code, seconds instead of minutes.
TINY_VAE = [
    str(ROOT / "configs/demo/vae.yaml"),
    *QUIET,
    *ADAMW,
    "data.limit=24",
    *WHOLE,
    "data.holdout=4",
    "model.sample_size=16",
    "model.block_out_channels=[8, 16]",
    "model.norm_num_groups=4",
    "train.steps=6",
    "train.batch_size=8",
    "optimizer.warmup_steps=2",
    "validation.every=3",
    "validation.images=4",
    "output.checkpoint_every=3",
]
TINY_UNET = [
    str(ROOT / "configs/demo/unet.yaml"),
    *QUIET,
    *ADAMW,
    "optimizer.lr=1.0e-3",
    "allow_unfit_vae=true",
    "data.limit=24",
    "data.holdout=4",
    "model.block_out_channels=[8, 16]",
    "model.down_block_types=[DownBlock2D, CrossAttnDownBlock2D]",
    "model.up_block_types=[CrossAttnUpBlock2D, UpBlock2D]",
    "model.norm_num_groups=4",
    "text.token_std=null",
    "text.config={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}",
    "train.steps=6",
    "train.batch_size=8",
    "optimizer.warmup_steps=2",
    "validation.every=3",
    "validation.sample_every=3",
    "validation.num_inference_steps=3",
    "validation.prompts=[red apple, rocket]",
    "output.checkpoint_every=3",
]

OF_THE_MACHINE = ("images_per_second", "peak_memory", "seconds")  # in the log, but no result of the training


def demo_config(run: Path, *overrides: str) -> VAETrainingConfig:
    """The demo's stage 1 config on the plain embedded set, in fp32."""
    fixed = [f"output.folder={run}", "train.precision=fp32", *EMBEDDED, *WHOLE]
    return load_config(VAETrainingConfig, ROOT / "configs" / "demo" / "vae.yaml", [*fixed, *overrides])


def run_vae(folder: Path, *overrides: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_vae.main([*TINY_VAE, f"output.folder={folder}", *overrides])
    return folder


def run_unet(folder: Path, vae: Path, *overrides: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_unet.main([*TINY_UNET, f"vae={vae}", f"output.folder={folder}", *overrides])
    return folder


def arguments(stage: int, folder: Path, vae: Path | None = None, *overrides: str) -> list[str]:
    """The command line of a tiny run of a stage, without the interpreter."""
    if stage == 1:
        return [str(ROOT / "train_vae.py"), *TINY_VAE, f"output.folder={folder}", *overrides]
    return [str(ROOT / "train_unet.py"), *TINY_UNET, f"vae={vae}", f"output.folder={folder}", *overrides]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A script in a process of its own; its two outputs in one."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0, timeout: float = 300) -> str:
    """Wait for a process; its output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == expected, output
    return output


def launch(processes: int, command: Sequence[str], *launcher_options: str) -> str:
    """The output of `accelerate launch` with this number of gloo processes, which must confirm their number."""
    options = [f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    options += ["--main_process_port=0", *(launcher_options or ["--multi_gpu"])]
    launcher = ["-m", "accelerate.commands.launch", *options]
    output = finish(start([*launcher, *command], ACCELERATE_USE_CPU="true"))
    assert f", {processes} process(es)" in output
    return output


def metrics(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_same_weights(one: Path, other: Path, name: str) -> None:
    one_tensors, other_tensors = load_file(one / name), load_file(other / name)
    assert one_tensors.keys() == other_tensors.keys()
    for key, value in one_tensors.items():
        assert torch.equal(value, other_tensors[key]), key

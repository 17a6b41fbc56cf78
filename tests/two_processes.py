"""Running a test file as a script on two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_on_two_processes(script: str, folder: Path) -> None:
    """`python script folder` on two processes, each with an accelerator of the other; an error fails the test."""
    # Not `accelerate launch --cpu --num_processes=2`, which starts a single process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    subprocess.run(
        [*launch, script, str(folder)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths},
        timeout=120,
    )

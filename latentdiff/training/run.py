"""A training run: its folder, resumable state, log, page and stop signals. Both stages train within one."""

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from latentdiff.config import Section, UNetTrainingConfig, VAETrainingConfig, load_config, to_yaml
from latentdiff.data.batches import Batch, BatchPlan, StepBatches, loader, read_ahead
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.devices import peak_flops, peak_memory, synchronize
from latentdiff.distributed import from_main, on_main
from latentdiff.evaluation.autoencoder import copy_report
from latentdiff.formats.files import write_text
from latentdiff.printable import first_line, printable
from latentdiff.training.accelerator import open_trackers
from latentdiff.training.checkpoint import (
    TrainingState,
    expected_size,
    list_checkpoints,
    require_disk_space,
    resume,
    save_checkpoint,
)
from latentdiff.training.contact_sheet import write_contact_sheet
from latentdiff.training.crowding import CrowdWatch
from latentdiff.training.logging import PUBLISHED_STEP, MetricsLog, ThroughputMeter, progress_bar
from latentdiff.training.loss_meter import Window
from latentdiff.training.run_folder import is_finished, write_record
from latentdiff.training.run_page import PAGE_FILE, State, next_command, write_page
from latentdiff.training.saving import Saver
from latentdiff.training.stopping import StopRequest
from latentdiff.training.verdict import Verdict


class Run:
    """Resumes when it is made; then `with run:` and `for step in run.steps(evaluate)` give the steps that are left.

    A signal ends the loop early, after a checkpoint; `stopped` then names it. Every process makes the same calls.
    """

    def __init__(
        self,
        config: VAETrainingConfig | UNetTrainingConfig,
        state: TrainingState,
        resume_from: str,
        accelerator: Accelerator,
        name: str,
        progress: bool,
    ) -> None:
        """resume_from: latest, never or a checkpoint folder. name: of the progress bar.

        Raises ValueError as `checkpoint.resume`, if the checkpoint is beyond train.steps, and if the disk is too full.
        """
        self.config, self.state, self.accelerator = config, state, accelerator
        self.folder, self.name, self.progress = Path(config.output.folder).expanduser(), name, progress
        self.resume_from = resume_from
        self.stopped: str | None = None
        self.between_steps = False  # whether an error came while no step was half done
        self.verdict: Verdict | None = None  # of the latest page
        # FLOPs of an image of a step, for `mfu` in the log; asked for where the device's peak is known.
        self.flops_of_image: Callable[[int], int] | None = None
        self._warned = False
        self._reading: Generator[Batch] | None = None
        resume(self.folder, state, resume_from, accelerator)
        check_steps(state.step, config.train.steps, self.folder)
        self.finished = self._has_nothing_left()
        if self.finished:
            return
        if state.step < config.train.steps:
            averages = 1 if state.power_ema is None else 1 + len(config.ema.snapshot_lengths)
            averages += 0 if state.best is None else 1
            require_disk_space(self.folder, expected_size(state, averages))
        write_config(config, self.folder, accelerator)
        on_main(accelerator, lambda: write_record(self.folder, config, finished=False))

    def _has_nothing_left(self) -> bool:
        """Whether this very run, with this config, is finished; then it says so."""
        same = False
        if self.accelerator.is_main_process and self.state.step == self.config.train.steps and is_finished(self.folder):
            without_log = {"logging"}
            with suppress(ValueError):  # a config of another version
                old = load_config(type(self.config), self.folder / "config.yaml")
                same = old.model_dump(exclude=without_log) == self.config.model_dump(exclude=without_log)
        (nothing_left,) = from_main(self.accelerator, [same])
        if nothing_left:
            self.accelerator.print(
                f"{self.folder} is finished: {self.state.step} steps. To train on, raise train.steps; to start over, "
                "use --resume never"
            )
            self.accelerator.end_training()
        return bool(nothing_left)

    def finish(self) -> None:
        """All is written: a later start with the same config does nothing; say what came out. On the main process."""
        write_record(self.folder, self.config, finished=True)
        self.show("finished")
        if self.verdict is not None:
            print(f"verdict: {self.verdict.text}\npage: {self.folder / PAGE_FILE}")
        if command := next_command(self.folder, self.config):
            print(f"next: {printable(command)}")

    def show(self, state: State) -> None:
        """Write the run's page, on the main process. A problem is one warning: it must not end the run."""
        if not self.accelerator.is_main_process:
            return
        with self._only_warning("the run's page"):
            self.verdict = write_page(self.folder, state)

    def show_images(self, images: CaptionedImages, held_out: CaptionedImages) -> None:
        """Write the images as the model sees them, for the run's page, on the main process. Problems as in `show`.

        In stage 2 also the report on its autoencoder: the page must not depend on another folder.
        """
        if not self.accelerator.is_main_process:
            return
        with self._only_warning("the images for the run's page"):
            prompts = self.config.validation.prompts if isinstance(self.config, UNetTrainingConfig) else ()
            write_contact_sheet(self.folder, images, held_out, prompts)
            if isinstance(self.config, UNetTrainingConfig) and self.config.vae is not None:
                copy_report(Path(self.config.vae).expanduser(), self.folder)

    @contextmanager
    def _only_warning(self, what: str) -> Iterator[None]:
        """Within the block an error is a warning, the first time."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                warnings.warn(f"{what} cannot be written: {first_line(error)}; training goes on", stacklevel=4)
            self._warned = True

    def _peak_flops(self) -> float | None:
        """FLOP/s of all processes' devices, as published; None if it is not known."""
        device, train = self.accelerator.device, self.config.train
        if device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(device), self.accelerator.mixed_precision, train.tf32)
        return None if peak is None else peak * self.accelerator.num_processes

    def micro_batches(
        self, data: Dataset, images: CaptionedImages, plan: BatchPlan, num_workers: int
    ) -> Iterator[Batch]:
        """This process's micro-batches of the steps that are left, in order; `data` has an item for each image."""
        train = self.config.train
        self.images = images
        self.batches = StepBatches(
            len(images),
            plan,
            self.accelerator.process_index,
            train.seed,
            self.state.step,
            train.steps,
            self.config.data.repeat,
            images.by_shape(),
            images.repeats,
            self.config.data.used_holdout,
        )
        device = self.accelerator.device
        batches = loader(data, self.batches, num_workers, pin_memory=device.type == "cuda")
        # Beside a CPU's own computation nothing is gained (docs/LOG.md); worker processes read ahead anyway.
        ahead = device.type == "cuda" and num_workers == 0
        self._reading = self._watched(read_ahead(batches, device) if ahead else batches)
        return self._reading

    def _watched(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The batches; an image that cannot be read any more ends the run between two steps."""
        try:
            yield from batches
        except OSError:
            self.between_steps = True
            raise

    def due(self, every: int) -> bool:
        """Whether something that is done every `every` steps and at the end is due at the current step."""
        return due(self.state.step, every, self.config.train.steps)

    def __enter__(self) -> Self:
        step = self.state.step
        open_trackers(self.config, self.accelerator, step)
        self.log = MetricsLog(self.folder, step, self.state.pending, self.accelerator)
        self.throughput = ThroughputMeter()
        self._first_step = step
        self._line_at = time.perf_counter()
        self._crowd = CrowdWatch(self.accelerator.device)
        self._peak = self._peak_flops()
        if self._peak is not None and self.flops_of_image is not None:
            self.flops_of_image(step)  # counted now, as it takes a while
        self.saver = Saver(self.folder, self.config.output, self.accelerator)
        self._stack = ExitStack()
        self._stop = self._stack.enter_context(StopRequest(self.accelerator))
        self.bar = self._stack.enter_context(progress_bar(self.name, step, self.config.train.steps, self.progress))
        self.show("training")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.show("stopped")  # while signals are still caught: a launcher ends the processes that are left
        self.saver.close(error)
        if self._reading is not None:
            self._reading.close()
        self._stack.__exit__(kind, error, trace)
        if self.between_steps and self.accelerator.num_processes == 1:
            self.state.pending = False  # what was due before this step was done
            with suppress(OSError, ValueError):
                save_checkpoint(self.folder, self.state, self.config.output, self.accelerator)
                print(f"\nsaved at step {self.state.step} in {self.folder}; run the same command again to resume")

    def steps(self, evaluate: Callable[[int], None]) -> Iterator[int]:
        """The optimiser steps that are left.

        Before a step, evaluation, EMA snapshot and checkpoint are made where they are due: each once, however often
        the run is resumed.
        """
        state, config, total = self.state, self.config, self.config.train.steps
        for step in range(state.step, total + 1):
            state.step = step
            self.stopped, failed = self._stop.agreed(self.saver.failed)
            if failed:
                self.saver.wait()  # raises it
            if self._interrupted(step):
                synchronize(self.accelerator.device)
                self.throughput.stop()
            if self.stopped is None and state.pending:
                evaluate(step)
                every = config.ema.snapshot_every
                if every is not None and state.power_ema is not None and step > 0 and self.due(every):
                    self.saver.snapshot(step, state.power_ema)
                state.pending = False
            if self.log.evaluated:
                self.log.evaluated = False
                self.show("training")
            if self.stopped is not None or (step > 0 and self.due(config.output.checkpoint_every)):
                self.saver.checkpoint(state)
            if self.stopped is not None or step == total:
                self.saver.wait()
                return
            state.pending = True
            self.throughput.start()
            yield step

    def _interrupted(self, step: int) -> bool:
        """Whether something comes between the steps that is no training."""
        config = self.config
        every = [config.validation.every, config.output.checkpoint_every, config.ema.snapshot_every]
        if isinstance(config, UNetTrainingConfig):
            every.append(config.validation.sample_every)
        return self.stopped is not None or any(number is not None and self.due(number) for number in every)

    def report(
        self,
        step: int,
        num_images: int,
        values: Mapping[str, float],
        extra: Callable[[int, Window], Mapping[str, float]] | None = None,
    ) -> None:
        """Count a finished step; at the logging interval, log the window since the last line.

        extra(finished_steps, window): further values, worked out only when a line is due.
        """
        if step == self._first_step:
            synchronize(self.accelerator.device)
            self.throughput.restart()
        else:
            self.throughput.add(num_images)
        self.bar.update()
        if not due(step + 1, self.config.logging.every, self.config.train.steps):
            return
        assert self.state.loss_meter is not None
        window = self.state.loss_meter.read()
        limit = self.config.train.max_skipped_steps
        if window.longest_skip_streak > limit:
            self.saver.wait()  # the message names the newest checkpoint, which may still be being written
        check_skipped(window, limit, self.batches, self.images, self.folder)
        speed = self._speed(step)
        logged = {**values, **speed, "skipped": window.skipped}
        if extra is not None:
            logged |= extra(step + 1, window)
        self.log.write(step + 1, window.means | logged)
        self.bar.set_postfix_str(summary(window, speed, self.verdict))
        self._crowd.look(self.saver.writing)

    def _speed(self, step: int) -> dict[str, float]:
        """Of a line of the log: speed of the steps since the last line, the seconds since then, and memory."""
        speed: dict[str, float] = {}
        rate = self.throughput.read()
        if rate is not None:
            speed["images_per_second"] = rate
            if self.flops_of_image is not None and self._peak is not None:
                speed["mfu"] = rate * self.flops_of_image(step) / self._peak
        memory = peak_memory(self.accelerator.device)
        if memory is not None:
            speed["peak_memory"] = memory
        now = time.perf_counter()
        speed["seconds"] = now - self._line_at
        self._line_at = now
        return speed

    def choose_weights(self) -> None:
        """After the last step: make the EMA's average the weights to publish; print and log whose they are.

        Every process calls this. The checkpoints keep the average of the last step.
        """
        total, best = self.config.train.steps, self.state.best
        step, reason = total, f"the last one ({why_last(self.config)})"
        if best is not None and best.step is not None:
            step, reason = best.step, best.reason()
            self.state.ema.load(best.average)
        self.accelerator.print(f"published: step {step} of {total}, {reason}")
        self.log.write(total, {PUBLISHED_STEP: step})

    def end_stopped(self) -> None:
        """After a signal: say how to continue."""
        self.show("stopped")
        how = "the same command" if self.resume_from == "latest" else "the same command with --resume latest"
        self.accelerator.print(
            f"\n{self.stopped}: saved at step {self.state.step} in {self.folder}; run {how} again to resume"
        )
        self.accelerator.end_training()


def due(step: int, every: int, total: int) -> bool:
    """Whether something that is done every `every` steps and at the end is due at `step`."""
    return step % every == 0 or step == total


def why_last(config: VAETrainingConfig | UNetTrainingConfig) -> str:
    """Why the weights of the last step are published, in words."""
    if config.output.publish == "last":
        return "output.publish is last"
    if config.publishes_best:
        return "no usable validation loss"
    if config.data.has_validation_set:
        return "the default with an adversarial loss"
    return "there is no validation set"


def check_skipped(window: Window, limit: int, batches: StepBatches, images: CaptionedImages, run: Path) -> None:
    """Raise ValueError if more than `limit` steps in a row were skipped; the run's checkpoints stay valid."""
    if window.longest_skip_streak <= limit:
        return
    names = [images.name(index) for index in sorted(set(batches.global_batch(window.last_skipped_step)))]
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    saved = list_checkpoints(run)
    raise ValueError(
        f"the loss or its gradient was not finite in {window.longest_skip_streak} steps in a row "
        f"(train.max_skipped_steps is {limit}), the last time at step {window.last_skipped_step} with the images "
        f"{shown}. The weights are still those of the last finite step. Look at these images, lower optimizer.lr or "
        "use another train.precision; "
        + (f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet")
    )


def summary(window: Window, speed: Mapping[str, float], verdict: Verdict | None = None) -> str:
    """What the progress bar shows; speed: values of the log; verdict: of the latest validation."""
    parts = [f"loss {window.means['loss']:.4f}" if window.means else "no finite loss"]
    parts += [f"{window.skipped} skipped"] if window.skipped else []
    if verdict is not None and verdict.loss is not None and verdict.best_step is not None:
        parts.append(f"validation {verdict.loss:.4g}, best at {verdict.best_step}")
        parts += [verdict.kind] if verdict.is_alarming else []
    if "images_per_second" in speed:
        parts.append(f"{speed['images_per_second']:.1f} images/s")
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.0%}")
    if "peak_memory" in speed:
        parts.append(f"{speed['peak_memory'] / 1e9:.1f} GB")
    return ", ".join(parts)


def check_steps(step: int, total: int, folder: Path) -> None:
    """ValueError if the loaded checkpoint is beyond the last step of the run."""
    if step > total:
        raise ValueError(f"train.steps is {total}, but the newest checkpoint in {folder} is at step {step}")


def write_config(config: Section, run: Path, accelerator: Accelerator) -> None:
    """Write the resolved config into the run's folder: the file alone repeats the run."""
    if accelerator.is_main_process:
        for leftover in (*run.glob(".*.tmp"), *run.glob("*/.*.tmp")):  # of a killed run
            if leftover.is_file():
                leftover.unlink()
        write_text(to_yaml(config), run / "config.yaml")
    accelerator.wait_for_everyone()


def describe(model: nn.Module) -> str:
    """One line on the model's size."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{type(model).__name__}: {count:,} parameters, {trained:,} trained"


def model_settings(**sections: Section | str | bool | None) -> dict[str, Any]:
    """The parts of a config that a resumed run must share with its checkpoint, as `section.key: value`."""
    flat: dict[str, Any] = {}
    for name, section in sections.items():
        if isinstance(section, Section):
            flat |= {f"{name}.{key}": value for key, value in section.model_dump(mode="json").items()}
        else:
            flat[name] = section
    return flat

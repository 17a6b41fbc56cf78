"""Run."""

import datasets
import pytest
from scripts import demo_config
from states import trained

from latentdiff.config import DataConfig, VAETrainingConfig, load_config
from latentdiff.data.batches import BatchPlan, StepBatches
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.training.checkpoint import (
    checkpoint_folder,
)
from latentdiff.training.loss_meter import Window
from latentdiff.training.run import check_skipped, due, summary, write_config
from latentdiff.training.verdict import verdict


def test_written_config_repeats_the_run(tmp_path, accelerator):
    config = demo_config(tmp_path, "train.steps=7", "optimizer.betas=[0.1, 0.3]")
    (tmp_path / "samples").mkdir()
    for leftover in (".config.yaml.1.tmp", "samples/.step_00000001.png.1.tmp"):
        (tmp_path / leftover).write_text("of a killed run", encoding="utf-8")
    write_config(config, tmp_path, accelerator)
    assert load_config(VAETrainingConfig, tmp_path / "config.yaml") == config
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "samples"]


def test_due_at_multiples_and_at_the_end():
    assert [step for step in range(12) if due(step, 5, 11)] == [0, 5, 10, 11]
    assert [step for step in range(5) if due(step, 1, 4)] == [0, 1, 2, 3, 4]
    assert [step for step in range(4) if due(step, 100, 3)] == [0, 3]


def named_images(count: int) -> CaptionedImages:
    rows = [{"bytes": b"", "path": f"{index:02d}.png"} for index in range(count)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table = datasets.Dataset.from_dict({"image": rows}, features=features)
    return CaptionedImages(table, DataConfig(source="memory", size=8, captions="none"), 3, 0)


def test_too_many_skipped_steps_stop_the_run(tmp_path, accelerator):
    """With the names of the images of the last one, those of all processes."""
    images = named_images(12)
    batches = StepBatches(12, BatchPlan(8, 2, 2), rank=1, seed=3, start_step=0, total_steps=9)
    first, second = batches.order(0), batches.order(1)
    in_step_1 = sorted({*first[8:], *second[:4]})  # images 8 to 15 of the sequence of epochs
    window = Window({}, skipped=5, longest_skip_streak=4, last_skipped_step=1)
    for limit in (4, 5):
        check_skipped(window, limit, batches, images, tmp_path)
    message = (
        "the loss or its gradient was not finite in 4 steps in a row (train.max_skipped_steps is {}), the last time "
        f"at step 1 with the images {', '.join(f'{index:02d}.png' for index in in_step_1)}. The weights are still "
        "those of the last finite step. Look at these images, lower optimizer.lr or use another train.precision; {}"
    )
    with pytest.raises(ValueError) as error:
        check_skipped(window, 3, batches, images, tmp_path)
    assert str(error.value) == message.format(3, "there is no checkpoint yet")
    trained(tmp_path, accelerator, 1, 2)
    with pytest.raises(ValueError) as error:
        check_skipped(window, 0, batches, images, tmp_path)
    assert str(error.value) == message.format(0, f"the newest checkpoint is {checkpoint_folder(tmp_path, 2)}")


def test_a_long_list_of_images_is_cut(tmp_path):
    batches = StepBatches(30, BatchPlan(20, 20, 1), rank=0, seed=0, start_step=0, total_steps=1)
    shown = [f"{index:02d}.png" for index in sorted(batches.order(0)[:20])][:16]
    with pytest.raises(ValueError, match=f"with the images {', '.join(shown)} and 4 more. The weights"):
        check_skipped(Window({}, 1, 1, last_skipped_step=0), 0, batches, named_images(30), tmp_path)


def test_summary_shows_loss_skips_and_speed():
    speed = {"images_per_second": 12.34, "mfu": 0.338, "peak_memory": 2.35e9, "seconds": 3.0}
    assert summary(Window({"loss": 0.12346, "kl": 9.0}, 0, 0, 0), speed) == (
        "loss 0.1235, 12.3 images/s, MFU 34%, 2.4 GB"
    )
    assert summary(Window({"loss": 2.0}, 3, 2, 7), {"images_per_second": 100.0}) == (
        "loss 2.0000, 3 skipped, 100.0 images/s"
    )
    assert summary(Window({}, 10, 10, 9), {}) == "no finite loss, 10 skipped"
    said = verdict({"validation/loss": {0: 1.0, 100: 0.4, 200: 0.5236}, "loss": {100: 0.3, 200: 0.2}})
    assert summary(Window({"loss": 0.2}, 0, 0, 0), {"images_per_second": 5.0}, said) == (
        "loss 0.2000, validation 0.5236, best at 100, overfitting, 5.0 images/s"
    )

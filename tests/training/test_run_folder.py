"""A run owns its folder, and a resume notices what has changed since."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_sets import image_set
from PIL import Image
from scripts import assert_same_weights, metrics, run_unet, run_vae
from tiny import tiny_pipeline, tiny_vae

from latentdiff.data.batches import Item, Key
from latentdiff.data.captioned_images import CaptionedImages
from latentdiff.training.checkpoint import list_checkpoints
from latentdiff.training.data_record import DataRecord
from latentdiff.training.run_folder import is_finished

OWN = ["data.source={}", "data.limit=null", "data.holdout=2", "train.batch_size=4"]
HOLD = """
import sys, time
from pathlib import Path
from latentdiff.training.run_folder import _claimed
from scripts import demo_config
with _claimed(Path(sys.argv[1]), demo_config(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def images_in(folder: Path, count: int = 10) -> list[str]:
    """Write a captioned folder; the arguments of a run on it."""
    folder.mkdir()
    for i in range(count):
        Image.linear_gradient("L").resize((16, 16)).rotate(10 * i).convert("RGB").save(folder / f"{i}.png")
    write_captions(folder, {f"{i}.png": f"image {i}" for i in range(count)})
    return [option.format(folder) for option in OWN]


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    """The lock of a killed process is gone with it."""
    folder = tmp_path / "run"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{HOLD}", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{folder} is in use by process {first.pid} on .*, which trains there"):
            run_vae(folder)
        assert {path.name for path in folder.iterdir()} == {".lock"}
        first.send_signal(signal.SIGKILL)
    run_vae(folder, "train.steps=1")
    assert is_finished(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, vae_run: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "ema.json").write_text("{}")
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    for name in ("vae", "pipeline"):
        with pytest.raises(ValueError, match=f"{name} holds a model that was not trained there; choose another output"):
            run_vae(tmp_path / name)
    with pytest.raises(ValueError, match="ema was written by `latentdiff ema`"):
        run_unet(tmp_path / "ema", vae_run)
    with pytest.raises(ValueError, match=r"output.folder .*/file"):
        run_vae(tmp_path / "file")
    with pytest.raises(ValueError, match=r"is in data.source .* choose a folder elsewhere"):
        run_vae(tmp_path / "run", f"data.source={tmp_path}")
    assert contents(tmp_path) == before
    message = r"is a run of stage 1 \(latentdiff train-vae\); choose another output.folder for"
    with pytest.raises(ValueError, match=message):
        run_unet(vae_run, vae_run, "train.steps=1")


def test_stage_2_says_that_stage_1_has_not_finished(vae_run: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    shutil.copyfile(vae_run / "config.yaml", tmp_path / "vae" / "config.yaml")
    with pytest.raises(ValueError, match="has not finished; run latentdiff train-vae .*/vae/config.yaml first"):
        run_unet(tmp_path / "run", tmp_path / "vae")
    assert not (tmp_path / "run").exists()


@pytest.mark.runs
def test_a_finished_run_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = images_in(tmp_path / "images"), tmp_path / "run"
    run_vae(run, *data, "train.steps=3")
    before = contents(run)
    run_vae(run, *data, "train.steps=3", "logging.every=2")
    assert f"{run} is finished: 3 steps. To train on, raise train.steps" in capsys.readouterr().out
    others = images_in(tmp_path / "others", count=9)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "others" / "0.png")
    for options in (others, [*others, "train.steps=5"]):
        with pytest.raises(ValueError, match=f"{run} is a finished run of other data: images changed: 1 of 8"):
            run_vae(run, *options)
    (tmp_path / "others" / "metadata.jsonl").unlink()
    for i in range(9):
        Image.new("RGB", (16, 16), (0, i, i)).save(tmp_path / "others" / f"{i}.png")
    with pytest.raises(ValueError, match="none of its training images is in data.source"):
        run_vae(run, *others, "data.captions=none")
    assert contents(run) == before
    run_vae(run, *data, "train.steps=5")
    assert is_finished(run) and [int(folder.name[5:]) for folder in list_checkpoints(run)] == [3, 5]


@pytest.mark.runs
def test_a_vanished_image_ends_the_run_with_its_state_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = images_in(tmp_path / "images"), tmp_path / "run"
    options = [
        *data,
        "data.holdout=0",
        "data.repeat=1",
        "train.steps=6",
        "output.checkpoint_every=6",
        "validation.every=6",
    ]
    straight = run_vae(tmp_path / "straight", *options)
    hidden = tmp_path / "hidden"

    def vanish(self: CaptionedImages, key: Key, read=CaptionedImages.__getitem__) -> Item:
        if key["epoch"] == 1 and not hidden.exists():
            Path(self.name(key["index"])).rename(hidden)
        return read(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionedImages, "__getitem__", vanish)
        with pytest.raises(OSError, match=r"image .*/images/\d.png cannot be read: .*No such file") as error:
            run_vae(run, *options)
    assert "saved at step 2 in" in capsys.readouterr().out
    hidden.rename(str(error.value).split()[1])
    run_vae(run, *options)
    assert_same_weights(run, straight, "diffusion_pytorch_model.safetensors")
    assert metrics(run, "loss") == metrics(straight, "loss")


@pytest.mark.runs
def test_a_resume_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, vae, run = images_in(tmp_path / "images"), tmp_path / "vae", tmp_path / "run"
    run_vae(vae, *data, "train.steps=1")
    stopped = [*data, "train.steps=3", "output.checkpoint_every=1"]
    run_unet(run, vae, *stopped)
    shutil.rmtree(list_checkpoints(run)[-1])
    (run / "run.json").unlink()
    other = tmp_path / "other"
    run_vae(other, *data, "train.steps=1", "train.seed=1")
    with pytest.raises(ValueError, match="the weights of the autoencoder are others than it was trained with"):
        run_unet(run, other, *stopped)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / "3.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "images" / "new.png")
    captions = {f"{i}.png": f"image {i}" for i in range(10)} | {"3.png": "red", "new.png": "new"}
    write_captions(tmp_path / "images", captions)
    capsys.readouterr()
    run_unet(run, vae, *stopped, "optimizer.lr=2.0e-3")
    said = capsys.readouterr().out
    assert "changed since: images changed: 1 of 8 (3.png)\n" in said
    assert "changed since: captions of images changed: 1 of 8 (3.png)\n" in said
    assert "changed since: images added: " in said and "the learning rate of step 2: " in said


def test_differences_are_named() -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy() for _ in range(8)]
    old = DataRecord.of(image_set(arrays[:6], list("abcdef")), image_set(arrays[6:], list("gh")), {"vae": tiny_vae()})
    assert DataRecord.from_json(json.loads(json.dumps(old.to_json()))) == old
    assert old.changes_since(old) == [] and old.shares_images_with(old)
    arrays[2] = 255 - arrays[2]
    new = DataRecord.of(
        image_set(arrays[:5], list("abcxe")), image_set(arrays[6:], list("gh")), {"vae": tiny_vae(seed=1)}
    )
    assert new.changes_since(old) == [
        "other weights of the vae",
        "images changed: 1 of 6 (row 2)",
        "captions of images changed: 1 of 6 (row 3)",
        "images removed: 1 of 6 (row 5)",
    ]
    inverse = image_set([255 - array for array in arrays])
    assert not DataRecord.of(inverse, inverse, {}).shares_images_with(new)

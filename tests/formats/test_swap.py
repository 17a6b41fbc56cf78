"""A model that is saved over another: whatever interrupts it, one whole model is in the folder."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_models import assert_same_weights
from tiny import tiny_pipeline, tiny_vae

from latentdiff.formats import swap
from latentdiff.formats.files import write_json, write_safetensors, write_text
from latentdiff.formats.swap import writing_new
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.pipeline import LatentDiffusionPipeline

FILE_OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.utime")
KILLED = 77


def counting_hook(at: int | None) -> Callable[[], int]:
    """Count the operations that change files from now on; before number `at` the process ends as if killed."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in FILE_OPERATIONS:
            count += 1
            if count == at:
                os._exit(KILLED)

    sys.addaudithook(hook)
    return lambda: count


def in_a_child(work: Callable[[], object], at: int | None) -> tuple[int, int]:
    """Run `work` in a forked process, killed before file operation number `at`: exit status and operations."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            operations = counting_hook(at)
            work()
            os.write(writing, str(operations()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        counted = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(counted or 0)


def kill_everywhere(
    old: Callable[[Path], None], new: Callable[[Path], None], whole: Callable[[Path], str], place: Path
):
    """What `whole` says of the folder after each kill, and that the next save leaves nothing but the new model."""
    folder = place / "model"

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        old(folder)
        write_text("old", folder / "metrics.jsonl")
        write_text("deep", folder / "checkpoints/step_00000001/manifest.json")

    begin()
    status, operations = in_a_child(lambda: new(folder), None)
    assert status == 0 and whole(folder) == "new"
    found = []
    for at in range(1, operations + 1):
        begin()
        assert in_a_child(lambda: new(folder), at)[0] == KILLED
        found.append(whole(folder))
        assert (folder / "metrics.jsonl").read_text() == "old"
        assert (folder / "checkpoints/step_00000001/manifest.json").read_text() == "deep"
    new(folder)
    assert whole(folder) == "new"
    assert os.listdir(place) == ["model"] and not [name for name in os.listdir(folder) if name.startswith(".")]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="folders trade places in one step on Linux")
def test_a_killed_save_leaves_the_old_or_the_new_autoencoder(tmp_path: Path) -> None:
    old, new = tiny_vae(seed=0), tiny_vae(seed=1)

    def whole(folder: Path) -> str:
        opened = AutoencoderKL.from_pretrained(folder)
        is_new = torch.equal(opened.state_dict()["encoder.conv_in.weight"], new.encoder.conv_in.weight)
        assert_same_weights(opened, new if is_new else old)
        return "new" if is_new else "old"

    found = kill_everywhere(old.save_pretrained, new.save_pretrained, whole, tmp_path / "place")
    assert found == sorted(found, reverse=True) and {"old", "new"} == set(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="folders trade places in one step on Linux")
def test_a_killed_save_leaves_the_old_or_the_new_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "old")
    old = pipeline.unet.conv_in.weight.detach().clone()

    def save_new(folder: Path) -> None:
        with torch.no_grad():
            pipeline.unet.conv_in.weight.copy_(old + 1)
        pipeline.save_pretrained(folder)

    def whole(folder: Path) -> str:
        opened = LatentDiffusionPipeline.from_pretrained(folder).unet.conv_in.weight
        is_new = torch.equal(opened, old + 1)
        assert is_new or torch.equal(opened, old)
        return "new" if is_new else "old"

    found = kill_everywhere(lambda folder: shutil.copytree(tmp_path / "old", folder), save_new, whole, tmp_path / "p")
    assert found == sorted(found, reverse=True) and {"old", "new"} == set(found)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; those of weights without their header, whose metadata come in any order."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    whole = {name: path.read_bytes() for name, path in files.items()}
    return {
        name: data[8 + int.from_bytes(data[:8], "little") :] if name.endswith(".safetensors") else data
        for name, data in whole.items()
    }


@pytest.mark.parametrize("obstacle", ["trading", "links", "none"])
def test_exactly_one_model_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str) -> None:
    """Also where folders cannot trade places, or files have no second name."""

    def impossible(*_: object) -> None:
        raise OSError("this file system has no links")

    if obstacle == "trading":
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    elif obstacle == "links":
        monkeypatch.setattr(os, "link", impossible)
    folder = tmp_path / "place" / "model"
    tiny_vae(seed=0).save_pretrained(folder)
    write_safetensors({"old": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    write_safetensors({"old": torch.zeros(1)}, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    write_json({"weight_map": {}}, folder / "diffusion_pytorch_model.safetensors.index.json")
    write_json({}, folder / "latent_preview.json")
    others = {"config.yaml": b"vae: null\n", "samples/step_00000001.png": b"image", "empty/.keep": b""}
    for name, content in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("samples")
    (folder / "dangling").symlink_to("nowhere")
    folder.chmod(0o750)
    new = tiny_vae(seed=1)
    new.save_pretrained(folder)
    expected = {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "link",
        "dangling",
        "config.yaml",
        "samples",
        "empty",
    }
    assert set(os.listdir(folder)) == expected and os.listdir(folder.parent) == ["model"]
    assert {name: (folder / name).read_bytes() for name in others} == others
    assert os.readlink(folder / "link") == "samples" and stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert_same_weights(AutoencoderKL.from_pretrained(folder), new)


def test_a_pipeline_replaces_a_pipeline_of_other_parts(tmp_path: Path) -> None:
    """No stale variant, shard or safety checker is left; what the user put there stays."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    plain = contents(tmp_path / "model")
    stale = (
        *("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model-00001-of-00002.safetensors"),
        *("vae/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "vae/diffusion_pytorch_model.bin"),
        *("vae/diffusion_pytorch_model.safetensors.fp16.index.json", "tokenizer/spiece.model", "tokenizer/vocab.txt"),
    )
    for name in (
        *stale,
        "text_encoder/model.safetensors.index.json",
        "safety_checker/config.json",
        "vae/evaluation.png",
    ):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("stale")
    pipeline.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == plain | {"vae/evaluation.png": b"stale"}
    assert not (tmp_path / "model" / "safety_checker").exists()
    link = tmp_path / "link"
    link.symlink_to("model")
    pipeline.save_pretrained(link)
    assert link.is_symlink() and contents(link) == plain | {"vae/evaluation.png": b"stale"}


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    pipeline, vae = tiny_pipeline(), tiny_vae()
    vae.save_pretrained(tmp_path / "saved" / "vae")
    write_text("", tmp_path / "saved" / "vae" / "config.yaml")
    pipeline.save_pretrained(tmp_path / "pipeline")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="saved/vae is a training run; save the pipeline into another folder"):
        pipeline.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved/vae holds a single model \(config.json\)"):
        pipeline.save_pretrained(tmp_path / "saved" / "vae")
    with pytest.raises(ValueError, match="pipeline holds a pipeline; save the AutoencoderKL into another folder"):
        vae.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="config.yaml is a file; a model needs a folder of its own"):
        vae.save_pretrained(tmp_path / "saved" / "vae" / "config.yaml")
    assert contents(tmp_path) == before


def test_threads_save_one_model(tmp_path: Path) -> None:
    models = [tiny_vae(seed=seed) for seed in range(4)]
    errors: list[BaseException] = []

    def save(model: AutoencoderKL) -> None:
        try:
            for _ in range(5):
                model.save_pretrained(tmp_path / "model")
                write_json({"same": "file"}, tmp_path / "model" / "evaluation.json")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["model"]
    opened = AutoencoderKL.from_pretrained(tmp_path / "model").state_dict()
    assert any(all(torch.equal(opened[key], value) for key, value in m.state_dict().items()) for m in models)


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        tiny_vae().save_pretrained(tmp_path / "model")
        write_json({}, tmp_path / "file.json")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    private = {"config.json", "diffusion_pytorch_model.safetensors", "file.json"}
    assert modes == dict.fromkeys(private, 0o600) | {"model": 0o700}


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    vae = tiny_vae(seed=0)
    vae.save_pretrained(tmp_path / "measured")
    size = sum(path.stat().st_size for path in (tmp_path / "measured").iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + size // 2}", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs takes root")
    try:
        vae.save_pretrained(disk / "model")
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device"):
                tiny_vae(seed=1).save_pretrained(disk / "model")
            assert_same_weights(AutoencoderKL.from_pretrained(disk / "model"), vae)
            assert os.listdir(disk) == ["model"] and len(os.listdir(disk / "model")) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_new_name_is_taken_whole_or_not_at_all(tmp_path):
    """Also if something else takes it meanwhile, and if a killed process left its half."""
    leftover = tmp_path / ".a.bin.0123456789abcdef.tmp"
    leftover.mkdir()
    (leftover / "a.bin").write_text("half")
    with writing_new(tmp_path / "a.bin") as staged:
        (staged.parent / "more").mkdir()
        staged.write_text("new")
        assert not (tmp_path / "a.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_text() == "new"
    for name in ("b.bin", "b"):
        with pytest.raises(ValueError, match=f"{name} exists"), writing_new(tmp_path / name) as staged:
            if name == "b":
                staged.mkdir()
            (staged / "inside" if name == "b" else staged).write_text("new")
            (tmp_path / name).write_text("theirs")
        assert (tmp_path / name).read_text() == "theirs"
    with pytest.raises(ValueError, match="a.bin exists"), writing_new(tmp_path / "a.bin"):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), writing_new(tmp_path / "c") as staged:
        staged.write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b", "b.bin"]

"""`latentdiff push`: exactly which files leave the machine, in which state, and what it refuses. No network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors
import pytest
import yaml
from command_line import refusal
from PIL import Image
from tiny import tiny_pipeline, tiny_vae

from latentdiff.commands.cli import main

PIPELINE = {
    *("generation_config.json", "model_index.json", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer.json"),
    *("tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
}
CARD = """---
license: unknown
---
![s](samples/step_00000002.png) ![](../secret.png) ![](/etc/a.png) ![web](https://x.org/a.png) <img src="b%20c.png">
![text](secret.txt)
"""


class FakeHub:
    """Stands in for HfApi: keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, private: bool = False, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.created: list[tuple[str, bool | None, bool]] = []
        self.files: dict[str, bytes] | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.created.append((repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert repo_id.startswith("me/") and commit_message
        root = Path(folder_path)
        self.files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A run with everything that should stay on the machine."""
    run = shutil.copytree(saved, tmp_path / "run")
    (run / "README.md").write_text(CARD)
    config = {"vae": "/home/me/vae", "data": {"source": "~/photos/*.parquet", "size": 16}, "output": {"folder": "a/b"}}
    config["validation"] = {"prompts": ["/a cat", "~ ä"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("samples/step_00000001.png", "samples/step_00000002.png", "b c.png", "../secret.png"):
        (run / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(run / name)
    for name in ("metrics.jsonl", "checkpoints/step_1/model.safetensors", "latents/a.safetensors", "secret.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("secret")
    for name in ("run.json", ".lock", "unet/diffusion_pytorch_model.bin", "vae/vae_report.json", "unet/optimizer.pt"):
        (run / name).write_text("secret")
    return run


def test_exactly_the_models_files_are_uploaded(folder: Path, monkeypatch, capsys) -> None:
    before = (folder / "config.yaml").read_bytes()
    named = json.loads((folder / "unet/config.json").read_text()) | {"_name_or_path": "/home/me/sd/unet"}
    (folder / "unet/config.json").write_text(json.dumps(named))
    hub = FakeHub(monkeypatch)
    main(["push", str(folder), "demo"])
    printed = capsys.readouterr().out
    assert hub.files is not None and hub.created == [("demo", None, True)]
    assert hub.files.keys() == PIPELINE | {"README.md", "config.yaml", "samples/step_00000002.png", "b c.png"}
    changed = {"config.yaml", "unet/config.json"}
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items() if name not in changed)
    assert yaml.safe_load(hub.files["config.yaml"]) == {
        "vae": "vae",
        "data": {"source": "*.parquet", "size": 16},
        "output": {"folder": "a/b"},
        "validation": {"prompts": ["/a cat", "~ ä"]},
    }
    assert json.loads(hub.files["unet/config.json"]) == named | {"_name_or_path": "unet"}
    assert (folder / "config.yaml").read_bytes() == before
    total = sum(map(len, hub.files.values()))
    assert f"{total:,}  bytes in {len(hub.files)} files" in printed
    assert all(
        any(line.split("  ")[-1] == name or f"  {name}  (" in line for line in printed.splitlines())
        for name in hub.files
    )
    assert "README.md says `license: unknown`" in printed and printed.endswith("https://huggingface.co/me/demo\n")


def test_dry_run_prints_only(folder: Path, monkeypatch, capsys) -> None:
    hub = FakeHub(monkeypatch)
    main(["push", str(folder), "me/demo", "--dry-run"])
    assert hub.created == [] and hub.files is None
    assert f" bytes in {len(PIPELINE) + 4} files" in capsys.readouterr().out


def test_autoencoder(monkeypatch, capsys, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)
    (tmp_path / "vae_report.json").write_text("{}")
    hub = FakeHub(monkeypatch)
    main(["push", str(tmp_path), "me/vae"])
    assert hub.files is not None and hub.files.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "There is no README.md" in capsys.readouterr().out


def test_private(folder: Path, monkeypatch, capsys) -> None:
    hub = FakeHub(monkeypatch, private=True)
    main(["push", str(folder), "me/demo", "--private"])
    assert hub.created == [("me/demo", True, True)] and hub.files is not None
    public = FakeHub(monkeypatch, private=False)
    with pytest.raises(SystemExit):
        main(["push", str(folder), "me/demo", "--private"])
    error = capsys.readouterr().err
    assert "me/demo cannot be uploaded: it is a public repository; leave out --private" in error
    assert public.files is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.HTTPError("[Errno 111] Connection refused"), "Connection refused"),
        (huggingface_hub.errors.LocalTokenNotFoundError("Token is required,\n but none found"), "hf auth login"),
        (ValueError("Invalid metadata in README.md.\n- bad license"), "Invalid metadata in README.md. - bad license"),
    ],
)
def test_errors_of_the_hub_are_one_line(error: Exception, message: str, folder: Path, monkeypatch, capsys) -> None:
    FakeHub(monkeypatch, error=error)
    with pytest.raises(SystemExit) as end:
        main(["push", str(folder), "me/demo"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.count("\n") == 1


def test_refusals(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    hub = FakeHub(monkeypatch)
    (tmp_path / "empty").mkdir()
    error = refusal(capsys, "push", str(tmp_path / "empty"), "me/a")
    assert "has no model (model_index.json, config.json or pytorch_lora_weights.safetensors)" in error
    for name in ("a/b/c", "me/a b", "../a"):
        assert refusal(capsys, "push", str(folder), name).startswith(f"error: REPO_ID {name}: ")
    (folder / "samples/step_00000002.png").unlink()
    (folder / "samples/step_00000002.png").symlink_to(tmp_path / "secret.png")
    error = refusal(capsys, "push", str(folder), "me/a")
    assert "step_00000002.png is a link to a file outside" in error and error.count("\n") == 1
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "run/unet has no safetensors weights: nothing is uploaded" in refusal(capsys, "push", str(folder), "me/a")
    assert hub.created == []

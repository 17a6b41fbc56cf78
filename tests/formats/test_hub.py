"""What a user names: a folder or file here comes first, then the hub; each failure is one line with that name."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from latentdiff.formats.hub import local_path


def test_what_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert local_path("owner/name", [], "vae") == Path("owner/name")
    assert local_path("~/owner", [], "vae") == tmp_path / "owner"
    assert local_path(tmp_path / "a.safetensors", [], "vae") == tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", ["/nowhere", "~/nowhere", "./nowhere", "a/b/c", "saved/mine", ""])
def test_what_can_be_no_repository_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"^vae '{name}' does not exist; train one$"):
        local_path(name, [], "vae", "train one")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            GatedRepoError,
            "its terms must be accepted at https://huggingface.co/owner/name, and `hf auth login` run here",
        ),
        (RepositoryNotFoundError, r"there is no such repository, or it is private \(`hf auth login`\)"),
    ],
)
def test_what_the_hub_refuses(kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise kind.__new__(kind)  # without the response that its constructor wants

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    start = "^vae 'owner/name' is no folder or file here, and was not loaded from the hub: "
    with pytest.raises(ValueError, match=f"{start}{message}$"):
        local_path("owner/name", [], "vae")

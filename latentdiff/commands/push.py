"""`latentdiff push`."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from latentdiff.printable import cut, first_line, printable, shown

SUFFIXES = (".safetensors", ".json", ".txt")  # of a model's files: no pickled weights
# Files in which diffusers and transformers note the path that a part came from.
NAMED_IN = ("model_index.json", "config.json", "tokenizer_config.json")
NAMES = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Upload:
    """A file to upload. content: what it holds there, if that is not the file itself."""

    name: str  # in the repository
    path: Path
    content: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.content is None else len(self.content.encode())


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A finished run, a pipeline, autoencoder or LoRA.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the hub: NAME, or OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository; refuse a public one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be uploaded.")] = False,
) -> None:
    """Upload a model to the hub: its own files, its card, its config and the images of the card, nothing else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"REPO_ID {shown(repo_id)}: {first_line(error)}") from None
    uploads = choose_files(folder.expanduser())
    for upload in uploads:
        changed = "" if upload.content is None else "  (without paths of this machine)"
        print(f"{upload.size:14,}  {printable(upload.name)}{changed}")
    print(f"{sum(upload.size for upload in uploads):14,}  bytes in {len(uploads)} files")
    for line in _reminders(uploads):
        print(line)
    if not dry_run:
        print(_upload(uploads, repo_id, private))


def choose_files(folder: Path) -> list[Upload]:
    """What belongs to the model in a folder, and may leave the machine.

    Raises ValueError if there is no whole model, or a file is a link to one outside the folder.
    """
    from latentdiff.formats.diffusers_folder import MODEL_FILES, PIPELINE_FILE
    from latentdiff.formats.lora import LORA_FILE
    from latentdiff.pipeline.folder import PIPELINE_FILES
    from latentdiff.pipeline.trained_on import TRAINED_ON_FILE
    from latentdiff.training.model_card import CARD_FILE, CONFIG_FILE, images_shown

    kinds = {PIPELINE_FILE: PIPELINE_FILES, "config.json": MODEL_FILES, LORA_FILE: (LORA_FILE, TRAINED_ON_FILE)}
    name = next((name for name in kinds if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(
            f"{shown(folder)} has no model ({PIPELINE_FILE}, config.json or {LORA_FILE}): give a finished run, a "
            "pipeline, an autoencoder or a LoRA"
        )
    is_pipeline, patterns = name == PIPELINE_FILE, kinds[name]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    model = [path for path in found if path.suffix in SUFFIXES and path.is_file()]
    _check_whole(folder, model, is_pipeline)
    extra = [folder / name for name in (CARD_FILE, CONFIG_FILE, *images_shown(folder / CARD_FILE))]
    chosen = sorted({*model, *(path for path in extra if path.is_file())})
    for path in chosen:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{shown(path)} is a link to a file outside {shown(folder)}: put a copy in its place")
    return [Upload(path.relative_to(folder).as_posix(), path, _without_private(path)) for path in chosen]


def _check_whole(folder: Path, model: list[Path], is_pipeline: bool) -> None:
    """Raise ValueError if a part of the model has no files, or no weights in safetensors."""
    from latentdiff.formats.diffusers_folder import COMPONENTS, NO_COMPONENT, PIPELINE_FILE
    from latentdiff.formats.files import read_json

    places = [folder]
    if is_pipeline:
        index = read_json(folder / PIPELINE_FILE)
        places = [folder / part for part in COMPONENTS if index.get(part, NO_COMPONENT) != NO_COMPONENT]
    for place in places:
        own = [path for path in model if path.parent == place]
        weights = place.name not in ("tokenizer", "scheduler")
        if not own or (weights and not any(path.suffix == ".safetensors" for path in own)):
            raise ValueError(
                f"{shown(place)} has no {'safetensors weights' if weights else 'files'}: nothing is uploaded"
            )


def _without_private(path: Path) -> str | None:
    """The text of a config or a model's JSON without paths of this machine; None if it has none."""
    import json

    from latentdiff.formats.files import read_json
    from latentdiff.training.model_card import CONFIG_FILE, shareable_config, without_private_paths

    if path.name == CONFIG_FILE:
        text = shareable_config(path)
        return None if text == path.read_text(encoding="utf-8") else text
    if path.name in NAMED_IN:
        values: dict[str, Any] = read_json(path)
        shareable = values | without_private_paths({name: values[name] for name in NAMES if name in values})
        return None if shareable == values else json.dumps(shareable, indent=2, ensure_ascii=False) + "\n"
    return None


def _reminders(uploads: list[Upload]) -> Iterator[str]:
    """What a user may want to do first."""
    from latentdiff.training.model_card import CARD_FILE, IMAGE_SUFFIXES

    card = next((upload.path for upload in uploads if upload.name == CARD_FILE), None)
    if card is None:
        yield f"There is no {CARD_FILE}: the hub will show no model card."
    elif re.search(r"^license: unknown\b", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        yield f"{CARD_FILE} says `license: unknown`: fill in the licence of the weights and of the data."
    if any(PurePosixPath(upload.name).suffix in IMAGE_SUFFIXES for upload in uploads):
        yield "The images above are published too; those of an autoencoder's samples are images of the data set."


def _upload(uploads: list[Upload], repo_id: str, private: bool) -> str:
    """Upload the files in one commit; returns the address of the repository.

    Raises ValueError in one line if the hub cannot be reached or refuses, or the repository is public with `private`.
    """
    from huggingface_hub import HfApi

    # Of the HTTP library, which is another one in other versions of huggingface_hub.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    api = HfApi()
    try:
        # None: as the owner's settings say.
        repo = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo.repo_id).private:  # it was there before
            raise ValueError("it is a public repository; leave out --private, or choose another REPO_ID")
        with tempfile.TemporaryDirectory() as staged:
            for upload in uploads:
                _stage(upload, Path(staged) / upload.name)
            api.upload_folder(repo_id=repo.repo_id, folder_path=staged, commit_message="Upload with latentdiff")
    except (HTTPError, OSError, ValueError) as error:  # ValueError: such as a card whose header is no YAML
        reason = cut(" ".join(str(error).split()), 200) or type(error).__name__
        hint = "; log in with `hf auth login`" if "401" in reason or "token" in reason.lower() else ""
        raise ValueError(f"{shown(repo_id)} cannot be uploaded: {reason}{hint}") from None
    return str(repo)


def _stage(upload: Upload, target: Path) -> None:
    """Put what is to be uploaded under its name in the repository: a link, as weights are large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if upload.content is not None:
        target.write_text(upload.content, encoding="utf-8")
        return
    try:
        os.symlink(upload.path.resolve(), target)
    except OSError:  # Windows, without the right to make links
        shutil.copyfile(upload.path, target)

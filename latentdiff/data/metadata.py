"""Writing the captions of a folder as its metadata.jsonl, whatever form they were in."""

import json
from pathlib import Path

from latentdiff.config import COMPOSITIONS, EMBEDDED, DataConfig
from latentdiff.data.captions import metadata_files
from latentdiff.data.file_tree import FileTree
from latentdiff.data.sources import IMAGE, TEXT, is_table, open_source
from latentdiff.formats.files import write_text

METADATA_FILE = "metadata.jsonl"


def refuse_metadata(source: str) -> None:
    """Raise ValueError unless a source is a folder of images that has no metadata file yet."""
    folder = Path(source).expanduser()
    if source in (EMBEDDED, COMPOSITIONS) or not folder.is_dir():
        raise ValueError(f"metadata.jsonl can be written into a folder of images only, and {source!r} is none")
    if is_table(folder):
        raise ValueError(f"metadata.jsonl can be written into a folder of images only, but {source!r} holds tables")
    tree = FileTree.of_folder(source, folder)
    if any(address != str(folder / path) for path, address in tree.files.items()):
        raise ValueError(f"metadata.jsonl can be written into a folder of images only, but {source!r} holds archives")
    if present := metadata_files(tree):
        raise ValueError(f"{tree.files[present[0]]} is there already and is not replaced")


def write_metadata(config: DataConfig) -> list[Path]:
    """Write metadata.jsonl into data.source, or into the folder of each split that is read, and return the files.

    Every image has a line, in the order of training, one without a caption an empty text: training finds the same
    captions as before. Raises ValueError as `refuse_metadata`, and if there are no captions or they cannot be read.
    """
    refuse_metadata(config.source)
    splits = [config.training_split]
    if config.validation_source is None and config.validation_split not in (None, *splits):
        splits.append(config.validation_split)
    # All images are listed, also those that data.missing_captions leaves out.
    lenient = config.model_copy(update={"missing_captions": "empty"})
    contents: dict[Path, str] = {}
    for split in splits:
        table = open_source(lenient, config.source, split, progress=False, captions_needed=False).table
        if TEXT not in table.column_names:
            raise ValueError(f"{config.source!r} has no captions that metadata.jsonl could hold")
        folder = Path(config.source).expanduser() / (split or "")
        names = [Path(entry["path"]).relative_to(folder).as_posix() for entry in table[IMAGE]]
        contents[folder / METADATA_FILE] = "".join(map(_line, names, table[TEXT]))
    for path, content in contents.items():
        write_text(content, path)
    return list(contents)


def _line(name: str, text: str | list[str]) -> str:
    if "\\" in name:
        raise ValueError(f"{name!r} has a backslash, which metadata.jsonl takes for a folder's; rename it")
    texts = [text] if isinstance(text, str) else text
    row = {"file_name": name, "text": texts[0] if len(texts) == 1 else (texts or "")}
    # Escaped where a reader of lines, or of UTF-8, could stumble.
    plain = all(one.isprintable() for one in (name, *texts))
    return json.dumps(row, ensure_ascii=not plain) + "\n"

"""The CLIP tokenizer: reference ids, cleaning, truncation, files."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import latentdiff
from latentdiff.models.tokenizer import CLIPTokenizer, clean_text

REFERENCE = json.loads((Path(__file__).parents[1] / "assets" / "clip_reference_ids.json").read_text(encoding="utf-8"))


def plain_prompts() -> list[str]:
    """Prompts that no cleaning touches, so that readers without it agree too; the one that is too long left out."""
    rows = [row for row in REFERENCE if row["kind"] == "plain" and len(row["input_ids"]) < 77]
    return [row["prompt"] for row in rows if row["prompt"].isascii()]


def test_reference_ids(tokenizer: CLIPTokenizer) -> None:
    assert len(REFERENCE) == 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one reference prompt is too long
        input_ids = tokenizer([row["prompt"] for row in REFERENCE])
    assert input_ids.dtype == torch.int64 and input_ids.shape == (200, 77)
    for row, ids in zip(REFERENCE, input_ids.tolist(), strict=True):
        expected = row["input_ids"] + [49407] * (77 - len(row["input_ids"]))
        assert ids == expected, row["prompt"]


def test_special_tokens_in_a_prompt_are_text(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(["A <|ENDOFTEXT|> b <|startoftext|>"])[0].tolist()
    assert ids.count(49406) == 1 and ids[0] == 49406
    first_end = ids.index(49407)
    assert first_end > 10 and set(ids[first_end:]) == {49407}


def test_cleaning() -> None:
    assert clean_text("  It’s &amp;amp; a\n\tCAFÃ© ﬂoor ") == "it's & a café floor"


def test_properties(tokenizer: CLIPTokenizer) -> None:
    assert (tokenizer.max_length, tokenizer.vocab_size) == (77, 49408)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)


def test_empty_prompt_and_empty_batch(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer([""]).tolist() == [[49406] + [49407] * 76]
    assert tokenizer([]).shape == (0, 77)


def test_a_text_of_75_tokens_fits(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer.words("cat " * 75)) == 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer(["cat " * 75])[0, -1] == 49407
        assert tokenizer(["cat " * 75])[0, -2] == tokenizer(["cat"])[0, 1]


def test_truncation_warns_once_and_names_the_lost_words(tokenizer: CLIPTokenizer) -> None:
    long = "Cat " * 75 + "beside a “Café” \U0001f996"
    with pytest.warns(UserWarning) as caught:
        input_ids = tokenizer(["a dog", long, long])
    assert len(caught) == 1
    assert "has 84 tokens, the text encoder reads 77" in str(caught[0].message)
    assert str(caught[0].message).endswith("cut off " + repr('beside a "café" \U0001f996'))
    assert caught[0].filename == __file__
    cat = tokenizer(["cat"])[0, 1].item()
    assert input_ids[1].tolist() == [49406] + [cat] * 75 + [49407]

    with pytest.warns(UserWarning) as caught:
        tokenizer([long, "dog " * 80])
    assert len(caught) == 2

    # the dinosaur is two tokens; cut between them, it is lost
    with pytest.warns(UserWarning, match="cut off '\U0001f996 b'"):
        tokenizer(["cat " * 74 + "\U0001f996 b"])


def test_shorter_rows() -> None:
    short = CLIPTokenizer.load(max_length=8)
    with pytest.warns(UserWarning, match="cut off 'g h'"):
        assert short(["a b c d e f g h"])[0].tolist() == [49406, 320, 321, 322, 323, 324, 325, 49407]
    with pytest.raises(ValueError, match="max_length=2"):
        CLIPTokenizer.load(max_length=2)


@pytest.mark.parametrize("value", [None, 3, ["a"], b"cat"])
def test_only_strings(tokenizer: CLIPTokenizer, value: object) -> None:
    with pytest.raises(ValueError) as error:
        tokenizer(["a cat", value])
    assert f"texts[1] is {value!r}" in str(error.value)


def test_a_bare_string_is_not_a_list_of_letters(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="'a cat', it must be a list"):
        tokenizer("a cat")


@pytest.mark.runs
def test_stable_diffusion_2_pads_with_zero(saved_tokenizer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_tokenizer, tmp_path / "sd2")
    (folder / "tokenizer.json").unlink()
    # its two files disagree; special_tokens_map.json wins
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "model_max_length": 77}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
    tokenizer = CLIPTokenizer.load(folder)
    assert tokenizer.pad_token_id == 0
    assert tokenizer(["a cat"])[0].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    # a "!" in a prompt is not padding
    assert tokenizer(["cat!"])[0, :5].tolist() == [49406, 2368, 256, 49407, 0]

    tokenizer.save(tmp_path / "again")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert CLIPTokenizer.load(tmp_path / "again").pad_token_id == theirs.pad_token_id == 0
    prompts = ["a cat", "wow! a cat!!"]
    assert tokenizer(prompts).tolist() == theirs(prompts, padding="max_length")["input_ids"]

    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(ValueError, match="'<pad>' is not in the vocabulary"):
        CLIPTokenizer.load(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<my-cat>": 49408}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {"content": "<my-cat>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 49408, "content": "<my-cat>"}]}),
    ],
)
def test_added_tokens_are_refused(saved_tokenizer: Path, tmp_path: Path, file: str, content: dict) -> None:
    folder = shutil.copytree(saved_tokenizer, tmp_path / "copy")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"copy has tokens beside CLIP's own: '<my-cat>'. They are not supported"):
        CLIPTokenizer.load(folder)


@pytest.mark.parametrize(
    "removed",
    [(), ("vocab.json", "merges.txt", "special_tokens_map.json"), ("tokenizer.json", "tokenizer_config.json")],
    ids=["all files", "as transformers 5 writes", "as before"],
)
def test_saved_tokenizer_reads_everywhere(
    tokenizer: CLIPTokenizer, saved_tokenizer: Path, tmp_path: Path, removed: tuple[str, ...]
) -> None:
    folder = shutil.copytree(saved_tokenizer, tmp_path / "copy")
    for name in removed:
        (folder / name).unlink()
    prompts = plain_prompts()
    assert len(prompts) > 150
    expected = tokenizer(prompts)
    ours = CLIPTokenizer.load(folder)
    assert torch.equal(ours(prompts), expected)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    assert len(theirs) == 49408
    ids = theirs(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, expected)
    if "tokenizer_config.json" not in removed:
        assert theirs.model_max_length == 77


def test_saved_files_equal_the_package_files(saved_tokenizer: Path) -> None:
    package = Path(latentdiff.__file__).parent / "assets" / "clip"
    assert (saved_tokenizer / "merges.txt").read_bytes() == (package / "merges.txt").read_bytes()
    ours, source = (json.loads((folder / "vocab.json").read_text("utf-8")) for folder in (saved_tokenizer, package))
    assert ours == source


@pytest.mark.runs
def test_max_length_survives_the_files(tmp_path: Path) -> None:
    CLIPTokenizer.load(max_length=32).save(tmp_path)
    assert CLIPTokenizer.load(tmp_path).max_length == 32
    assert CLIPTokenizer.load(tmp_path, max_length=77).max_length == 77
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 32


def test_two_token_vocabulary_is_refused(saved_tokenizer: Path, tmp_path: Path) -> None:
    # transformers 5 accepts the argument names of transformers 4, ignores them, and says nothing
    empty = transformers.CLIPTokenizer(
        vocab_file=str(saved_tokenizer / "vocab.json"), merges_file=str(saved_tokenizer / "merges.txt")
    )
    assert len(empty) == 2
    empty.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="49408 tokens and 48894 merges, got 2 and 0") as error:
        CLIPTokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_tokenizer_folders(saved_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        CLIPTokenizer.load(tmp_path / "nowhere")
    folder = shutil.copytree(saved_tokenizer, tmp_path / "copy")
    merges = (folder / "merges.txt").read_text("utf-8")
    (folder / "merges.txt").write_text(merges[: len(merges) // 2], "utf-8")
    with pytest.raises(ValueError, match="48894 merges, got 49408 and"):
        CLIPTokenizer.load(folder)
    (folder / "merges.txt").write_text(merges.replace("\ni n\n", "\ni 9qz\n"), "utf-8")
    with pytest.raises(ValueError, match="do not belong together"):
        CLIPTokenizer.load(folder)
    (folder / "vocab.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="vocab.json is not valid JSON"):
        CLIPTokenizer.load(folder)

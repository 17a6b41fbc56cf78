"""The CLIP tokenizer against reference ids, the text encoder against transformers, and both through their files."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import latentdiff
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer, clean_text

REFERENCE = json.loads((Path(__file__).parent / "assets" / "clip_reference_ids.json").read_text(encoding="utf-8"))
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.load()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_config(TINY, seed=3).eval()


@pytest.fixture(scope="module")
def saved_tokenizer(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def saved_encoder(encoder: TextEncoder, tmp_path: Path) -> Path:
    encoder.save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def plain_prompts() -> list[str]:
    """Prompts that no cleaning touches, so that readers without it agree too; the one that is too long left out."""
    rows = [row for row in REFERENCE if row["kind"] == "plain" and len(row["input_ids"]) < 77]
    return [row["prompt"] for row in rows if row["prompt"].isascii()]


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def assert_same_weights(a: TextEncoder, b: TextEncoder) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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


def test_count_tokens_is_the_limit_of_what_fits(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.count_tokens("") == 2
    assert tokenizer.count_tokens("cat " * 75) == 77
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


def test_from_config_depends_on_its_seed_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = TextEncoder.from_config(TINY, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert_same_weights(first, TextEncoder.from_config(TINY, seed=5))
    other = TextEncoder.from_config(TINY, seed=6)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    # CLIP's own scheme: embeddings of deviation 0.02
    assert next(first.parameters()).std().item() == pytest.approx(0.02, rel=0.01)


def test_from_config_has_the_real_special_ids() -> None:
    config = TextEncoder.from_config({**TINY, "bos_token_id": 0, "eos_token_id": 2}, seed=0).model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (49406, 49407, 49407)
    assert (config.hidden_act, config.vocab_size) == ("quick_gelu", 49408)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hiden_layers": 2}, "num_hiden_layers"),
        ({"hidden_size": 33}, "33"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "quickgelu"}, "quickgelu"),
        ({"vocab_size": 1000}, "vocab_size=1000"),
    ],
)
def test_from_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TextEncoder.from_config({**TINY, **change}, seed=0)
    assert "\n" not in str(error.value)


def test_context_is_transformers_last_hidden_state(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    assert (encoder.hidden_size, encoder.max_length) == (32, 77)
    input_ids = tokenizer(["a red apple", "noto style, cat"])
    context = encoder(input_ids)
    assert context.shape == (2, 77, 32)
    output = encoder.model(input_ids=input_ids, output_hidden_states=True)
    assert torch.equal(context, output.last_hidden_state)
    # after the final norm, and not just the last layer
    assert torch.equal(context, encoder.model.final_layer_norm(output.hidden_states[-1]))
    # a mask of ones adds nothing to the causal one
    masked = encoder.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
    torch.testing.assert_close(context, masked, rtol=0, atol=1e-6)


def test_attention_is_causal(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    input_ids = tokenizer(["a red apple"])
    changed = input_ids.clone()
    changed[:, 10] = 0
    difference = (encoder(input_ids) - encoder(changed)).abs().amax(dim=(0, 2))
    assert difference[:10].max() < 1e-6
    # padding after the change sees it: nothing masks padding
    assert difference[10:].min() > 1e-5


def test_saved_encoder_opens_in_transformers(
    encoder: TextEncoder, saved_encoder: Path, tokenizer: CLIPTokenizer
) -> None:
    with safe_open(saved_encoder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert len(keys) == 2 + 2 * 16 + 2
    assert all(key.startswith("text_model.") for key in keys)
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in keys
    config = json.loads((saved_encoder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPTextModel"], "clip_text_model")
    assert (config["dtype"], config["eos_token_id"], config["hidden_size"]) == ("float32", 49407, 32)
    assert sorted(os.listdir(saved_encoder)) == ["config.json", "model.safetensors"]

    input_ids = tokenizer(["a red apple"])
    theirs = transformers.CLIPTextModel.from_pretrained(saved_encoder)
    assert torch.equal(theirs(input_ids).last_hidden_state, encoder(input_ids))


def test_both_prefix_styles_load_bit_equal(encoder: TextEncoder, saved_encoder: Path, tmp_path: Path) -> None:
    assert_same_weights(TextEncoder.from_pretrained(saved_encoder, frozen=True), encoder)
    assert_same_weights(TextEncoder.from_pretrained(str(tmp_path), frozen=True, subfolder=saved_encoder.name), encoder)
    encoder.model.save_pretrained(tmp_path / "new")
    assert_same_weights(TextEncoder.from_pretrained(tmp_path / "new", frozen=True), encoder)
    # very old files hold the positions as a tensor
    rewrite(saved_encoder, lambda t: {**t, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert_same_weights(TextEncoder.from_pretrained(saved_encoder, frozen=True), encoder)


def test_frozen_and_dtype(saved_encoder: Path) -> None:
    frozen = TextEncoder.from_pretrained(saved_encoder, frozen=True, dtype=torch.bfloat16)
    assert not frozen.training and not frozen.model.training
    assert {(p.requires_grad, p.dtype) for p in frozen.parameters()} == {(False, torch.bfloat16)}
    frozen.save_pretrained(saved_encoder)
    assert json.loads((saved_encoder / "config.json").read_text())["dtype"] == "bfloat16"
    # float32 unless asked, though the file now holds bfloat16
    trained = TextEncoder.from_pretrained(saved_encoder, frozen=False)
    assert trained.training and trained.model.training
    assert {(p.requires_grad, p.dtype) for p in trained.parameters()} == {(True, torch.float32)}


def test_text_tower_of_a_whole_clip_model(tmp_path: Path, tokenizer: CLIPTokenizer, capfd) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=TINY, vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=16
        )
    ).eval()
    clip.save_pretrained(tmp_path)
    capfd.readouterr()
    encoder = TextEncoder.from_pretrained(tmp_path, frozen=True)
    assert capfd.readouterr() == ("", "")
    input_ids = tokenizer(["a red apple"])
    assert torch.equal(encoder(input_ids), clip.text_model(input_ids=input_ids).last_hidden_state)
    # the file written from it is a plain text encoder
    encoder.save_pretrained(tmp_path / "alone")
    assert_same_weights(TextEncoder.from_pretrained(tmp_path / "alone", frozen=True), encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "fc1.bias" not in k}, "2 missing: encoder.layers.0.mlp.fc1.bias"),
        (lambda t: {**t, "text_model.final_layer_norm.weight": torch.ones(5)}, "1 of another shape: final_layer_norm"),
        (lambda t: {**t, "text_model.adapter.weight": torch.ones(5)}, "1 unexpected: .*adapter.weight"),
    ],
    ids=["missing", "shape", "unexpected"],
)
def test_loading_is_strict(saved_encoder: Path, change, message: str) -> None:
    rewrite(saved_encoder, change)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(saved_encoder, frozen=True)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(vocab_size=100, **TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        TextEncoder.from_pretrained(tmp_path, frozen=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1000])
def test_truncated_file_is_named(saved_encoder: Path, keep: int) -> None:
    file = saved_encoder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or cut short") as error:
        TextEncoder.from_pretrained(saved_encoder, frozen=True)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_nothing_under_that_name(saved_encoder: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "openai/no-such-text-encoder"):
        with pytest.raises(ValueError, match="no such folder") as error:
            TextEncoder.from_pretrained(name, frozen=True)
        assert name in str(error.value) and "\n" not in str(error.value)
    (saved_encoder / "model.safetensors").rename(saved_encoder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.safetensors"):
        TextEncoder.from_pretrained(saved_encoder, frozen=True)
    (saved_encoder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        TextEncoder.from_pretrained(saved_encoder, frozen=True)


def test_a_failed_save_keeps_the_old_file(encoder: TextEncoder, saved_encoder: Path) -> None:
    resource = pytest.importorskip("resource")
    other = TextEncoder.from_config(TINY, seed=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # as a full disk, after a megabyte
    try:
        with pytest.raises(OSError):
            other.save_pretrained(saved_encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(saved_encoder)) == ["config.json", "model.safetensors"]
    assert_same_weights(TextEncoder.from_pretrained(saved_encoder, frozen=True), encoder)


def test_diffusers_pipeline_opens_both(
    encoder: TextEncoder, saved_encoder: Path, saved_tokenizer: Path, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    shutil.copytree(saved_tokenizer, tmp_path / "tokenizer")
    parts = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    absent = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0", **parts}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **{name: [None, None] for name in absent}}))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent), requires_safety_checker=False)
    assert len(pipe.tokenizer) == 49408 and pipe.tokenizer.model_max_length == 77
    context, _ = pipe.encode_prompt("noto style, red apple", "cpu", 1, False)
    assert torch.equal(context, encoder(tokenizer(["noto style, red apple"])))

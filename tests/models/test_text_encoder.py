"""The CLIP text encoder: weights, context, files, parity with transformers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def saved_encoder(encoder: TextEncoder, tmp_path: Path) -> Path:
    encoder.save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def assert_same_weights(a: TextEncoder, b: TextEncoder) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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


def test_without_layers_the_context_is_the_normalised_embeddings(tmp_path: Path) -> None:
    """Also as transformers opens it."""
    encoder = TextEncoder.from_config({**TINY, "num_hidden_layers": 0}, seed=0)
    ids = torch.tensor([[49406, 320, 1929, 49407]])
    context = encoder(ids)
    assert context.shape == (1, 4, 32) and context.mean(dim=2).abs().max() < 1e-6
    changed = encoder(torch.tensor([[49406, 321, 1929, 49407]]))  # a token is seen at its own place alone
    assert [bool(same) for same in (changed == context).all(dim=2)[0]] == [True, False, True, True]
    encoder.save_pretrained(tmp_path)
    assert torch.equal(transformers.CLIPTextModel.from_pretrained(tmp_path)(ids).last_hidden_state, context)
    with pytest.raises(ValueError, match="clip_skip is 1, must be an integer in 0 .. 0"):
        encoder(ids, clip_skip=1)


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


def test_attention_in_training_agrees_with_that_of_inference(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    input_ids = tokenizer(["a red apple", "noto style, cat"])
    exact = encoder(input_ids)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fused = encoder(input_ids)
            assert encoder.model.config._attn_implementation == "sdpa"
        trained = encoder(input_ids)
        assert encoder.model.config._attn_implementation == "eager"
        changed = input_ids.clone()
        changed[:, 10] = 0
        assert torch.equal(trained[:, :10], encoder(changed)[:, :10])  # causal
    rounding = (fused - exact).abs().max()
    assert 0 < (trained - exact).abs().max() < 2 * rounding
    encoder.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(input_ids), fused)


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


def test_the_attention_is_not_for_the_folder_to_say(saved_encoder: Path, encoder: TextEncoder) -> None:
    config = json.loads((saved_encoder / "config.json").read_text())
    for key in ("_attn_implementation", "attn_implementation"):
        (saved_encoder / "config.json").write_text(json.dumps(config | {key: "someone/kernels"}))
        opened = TextEncoder.from_pretrained(saved_encoder, frozen=True)
        assert opened.model.config._attn_implementation == "sdpa"
        assert_same_weights(opened, encoder)


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
    with pytest.raises(ValueError, match="truncated or not a safetensors file") as error:
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


def test_token_std_is_of_the_token_vectors_alone():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain, scaled = TextEncoder.from_config(text, 0), TextEncoder.from_config(text, 0, token_std=0.2)
    differing = [
        (key, value)
        for (key, value), other in zip(scaled.named_parameters(), plain.parameters(), strict=True)
        if not torch.equal(value, other)
    ]
    assert len(differing) == 1 and differing[0][0].endswith("token_embedding.weight")
    assert differing[0][1].std().item() == pytest.approx(0.2, rel=0.01)

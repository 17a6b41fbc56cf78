"""The CLIP text encoder: weights, context, files, parity with transformers."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from model_pairs import assert_same_weights, transformers_twin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import perturb, relative_error

from latentdiff.models import layers
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
    config = TextEncoder.from_config({**TINY, "bos_token_id": 0, "eos_token_id": 2}, seed=0).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (49406, 49407, 49407)
    assert (config.hidden_act, config.vocab_size) == ("quick_gelu", 49408)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hiden_layers": 2}, "num_hiden_layers"),
        ({"hidden_size": 33}, "33"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "quickgelu"}, "hidden_act: Input should be 'quick_gelu' or 'gelu', got 'quickgelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"vocab_size": 1000}, "vocab_size=1000"),
    ],
)
def test_from_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TextEncoder.from_config({**TINY, **change}, seed=0)
    assert "\n" not in str(error.value)


def test_a_seed_gives_the_weights_that_it_gives_in_transformers() -> None:
    config = {**TINY, "num_hidden_layers": 3, "hidden_act": "gelu", "initializer_factor": 2.0}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    ours = TextEncoder.from_config(config, seed=5).model
    assert_same_weights(ours, theirs)
    # in the same order too, which is that of an optimizer's state
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_random_weights_have_the_deviations_of_clip() -> None:
    encoder = TextEncoder.from_config({**TINY, "hidden_size": 256, "intermediate_size": 512}, seed=0)
    stds = {
        "embeddings.token_embedding": 0.02,
        "embeddings.position_embedding": 0.02,
        **dict.fromkeys([f"encoder.layers.1.self_attn.{name}_proj" for name in "qkv"], (2 * 2 * 256) ** -0.5),
        "encoder.layers.1.self_attn.out_proj": 256**-0.5,
        "encoder.layers.1.mlp.fc1": (2 * 256) ** -0.5,
        "encoder.layers.1.mlp.fc2": (2 * 2 * 256) ** -0.5,
    }
    for name, std in stds.items():
        assert encoder.model.get_parameter(f"{name}.weight").std().item() == pytest.approx(std, rel=0.02), name
    biases = [p for name, p in encoder.model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 8 + 1 and not any(bias.any() for bias in biases)


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}


def assert_parity(encoder: TextEncoder, input_ids: torch.Tensor, skip: int) -> None:
    """Values and all gradients, relative to the largest of each tensor, against transformers' model."""
    theirs = transformers_twin(encoder)
    hidden_states = theirs(input_ids=input_ids, output_hidden_states=True).hidden_states
    expected = theirs.final_layer_norm(hidden_states[-1 - skip])
    context = encoder(input_ids, skip)
    assert relative_error(context, expected) < 1e-6
    weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
    (context * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), other in zip(encoder.model.named_parameters(), theirs.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None), name
        if other.grad is not None and not name.endswith("k_proj.bias"):  # 0 but for rounding: softmax does not see it
            assert relative_error(ours.grad, other.grad) < 1e-5, name


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_parity_with_transformers(tokenizer: CLIPTokenizer, activation: str, skip: int) -> None:
    encoder = perturb(TextEncoder.from_config({**TINY, "hidden_act": activation}, seed=1))
    assert_parity(encoder, tokenizer(["a red apple", "noto style, cat"]), skip)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "skip"),
    [(CLIP_L, 1), ({**OPENCLIP_H, "hidden_act": "gelu"}, 0)],
    ids=["CLIP-L, clip_skip 1", "OpenCLIP-H"],
)
def test_parity_with_transformers_at_full_width(tokenizer: CLIPTokenizer, config: dict, skip: int) -> None:
    """The widths and heads of Stable Diffusion 1 and 2; of 23 layers, 6."""
    assert_parity(TextEncoder.from_config(config, seed=1), tokenizer(["a red apple", "noto style, cat"]), skip)


def test_context_is_transformers_last_hidden_state(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    assert (encoder.hidden_size, encoder.max_length) == (32, 77)
    input_ids = tokenizer(["a red apple", "noto style, cat"])
    context = encoder(input_ids)
    assert context.shape == (2, 77, 32)
    theirs = transformers_twin(encoder)
    assert torch.equal(context, theirs(input_ids=input_ids).last_hidden_state)
    # a mask of ones adds nothing to the causal one
    masked = theirs(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).last_hidden_state
    torch.testing.assert_close(context, masked, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="input_ids have 78 tokens, the text encoder reads 77"):
        encoder(torch.zeros(1, 78, dtype=torch.long))


def test_attention_is_causal(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    input_ids = tokenizer(["a red apple"])
    changed = input_ids.clone()
    changed[:, 10] = 0
    difference = (encoder(input_ids) - encoder(changed)).abs().amax(dim=(0, 2))
    assert difference[:10].max() < 1e-6
    # padding after the change sees it: nothing masks padding
    assert difference[10:].min() > 1e-5


def test_attention_in_training_agrees_with_that_of_inference(
    encoder: TextEncoder, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_ids = tokenizer(["a red apple", "noto style, cat"])
    exact = encoder(input_ids)
    plain: list[bool] = []
    original = layers.plain_attention

    def noted(*tensors: torch.Tensor, causal: bool) -> torch.Tensor:
        plain.append(causal)
        return original(*tensors, causal=causal)

    monkeypatch.setattr(layers, "plain_attention", noted)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fused = encoder(input_ids)
        assert plain == []
        trained = encoder(input_ids)
        assert plain == [True, True]
        changed = input_ids.clone()
        changed[:, 10] = 0
        assert torch.equal(trained[:, :10], encoder(changed)[:, :10])  # causal
    rounding = (fused - exact).abs().max()
    assert 0 < (trained - exact).abs().max() < 2 * rounding
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(input_ids), fused)


def test_bfloat16_weights(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    input_ids = tokenizer(["a red apple"])
    with torch.no_grad():
        context = copy.deepcopy(encoder).bfloat16()(input_ids)
        assert context.dtype == torch.bfloat16
        assert relative_error(context.float(), encoder(input_ids)) < 0.03


def test_gradient_checkpointing_changes_no_number(tokenizer: CLIPTokenizer) -> None:
    encoder, input_ids = TextEncoder.from_config(TINY, seed=0).train(), tokenizer(["a red apple"])
    calls: list[int] = []
    encoder.model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor | None]:
        encoder.zero_grad()
        encoder(input_ids).square().sum().backward()
        return [p.grad for p in encoder.parameters()]

    plain = gradients()
    assert len(calls) == 1
    encoder.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert len(calls) == 3  # again in the backward pass


@pytest.mark.slow
def test_compiles_as_one_graph(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    compiled = torch.compile(encoder, fullgraph=True)
    input_ids = tokenizer(["a red apple", "noto style, cat"])
    torch.testing.assert_close(compiled(input_ids), encoder(input_ids), rtol=1e-5, atol=1e-5)


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
    transformers_twin(encoder).save_pretrained(tmp_path / "new")
    assert_same_weights(TextEncoder.from_pretrained(tmp_path / "new", frozen=True), encoder)
    # very old files hold the positions as a tensor
    rewrite(saved_encoder, lambda t: {**t, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert_same_weights(TextEncoder.from_pretrained(saved_encoder, frozen=True), encoder)


def test_the_attention_is_not_for_the_folder_to_say(saved_encoder: Path, encoder: TextEncoder) -> None:
    config = json.loads((saved_encoder / "config.json").read_text())
    for key in ("_attn_implementation", "attn_implementation"):
        (saved_encoder / "config.json").write_text(json.dumps(config | {key: "someone/kernels"}))
        opened = TextEncoder.from_pretrained(saved_encoder, frozen=True)
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
        (lambda t: {k: v for k, v in t.items() if "fc1.bias" not in k}, "missing encoder.layers.0.mlp.fc1.bias, enc"),
        (
            lambda t: {**t, "text_model.final_layer_norm.weight": torch.ones(5)},
            r"final_layer_norm.weight is \[5\]",
        ),
        (lambda t: {**t, "text_model.adapter.weight": torch.ones(5)}, "unexpected adapter.weight"),
    ],
    ids=["missing", "shape", "unexpected"],
)
def test_loading_is_strict(saved_encoder: Path, change, message: str) -> None:
    rewrite(saved_encoder, change)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_pretrained(saved_encoder, frozen=True)


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_what_changes_nothing_is_accepted_in_a_config(saved_encoder: Path, encoder: TextEncoder) -> None:
    """The keys of configs on the hub, of Stable Diffusion 1.5 and of a text_config of transformers 4."""
    edit_config(saved_encoder, dropout=0.0, torch_dtype="float16", transformers_version="4.22.0", _name_or_path="x/y")
    edit_config(saved_encoder, top_k=50, id2label={"0": "LABEL_0"}, use_cache=True, bad_words_ids=None, pruned_heads={})
    edit_config(saved_encoder, bos_token_id=0, eos_token_id=2, pad_token_id=1, projection_dim=None)
    opened = TextEncoder.from_pretrained(saved_encoder, frozen=True)
    assert_same_weights(opened, encoder)
    assert opened.config.eos_token_id == 2  # as it was
    assert opened.to_transformers().keys() == encoder.to_transformers().keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "unknown key quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 3}, "hidden_size is 32, which num_attention_heads 3 does not divide"),
        ({"model_type": "bert"}, "describes a 'bert', not a CLIP text model"),
    ],
)
def test_what_would_change_the_context_is_refused_in_a_config(saved_encoder: Path, values: dict, message: str) -> None:
    edit_config(saved_encoder, **values)
    with pytest.raises(ValueError, match=message) as error:
        TextEncoder.from_pretrained(saved_encoder, frozen=True)
    assert str(saved_encoder / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_shards_and_variants(saved_encoder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    transformers_twin(encoder).half().save_pretrained(tmp_path, max_shard_size="2MB", variant="fp16")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    opened = TextEncoder.from_pretrained(tmp_path, frozen=True, variant="fp16", dtype=torch.float16)
    assert_same_weights(opened, copy.deepcopy(encoder).half())
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        TextEncoder.from_pretrained(tmp_path, frozen=True)


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
        with pytest.raises(ValueError, match="^text encoder '.*' (does not exist|is no folder or file here)") as error:
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

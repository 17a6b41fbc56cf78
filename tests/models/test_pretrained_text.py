"""Text encoders of transformers other than CLIP, tiny and random, with tokenizers built here."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from pretrained_texts import T5, save_tokenizer
from tiny import tiny_unet, tiny_vae

from latentdiff.data.latent_cache import text_digest
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.pretrained_text import NO_TOKEN, PretrainedTextEncoder, PretrainedTokenizer, open_text_encoder
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.pipeline.prompts import encode_prompts

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def models() -> dict[str, transformers.PreTrainedModel]:
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    text = {**SIZES, "vocab_size": 10, "max_position_embeddings": 12, "projection_size": 16}
    return {
        "T5EncoderModel": transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "BertModel": transformers.BertForMaskedLM(
            transformers.BertConfig(**SIZES, vocab_size=10, max_position_embeddings=12)
        ),
        "SiglipTextModel": transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, as they are on the hub: models with all their heads, beside their tokenizer."""
    root = tmp_path_factory.mktemp("pretrained")
    for name, model in models().items():
        model.eval().save_pretrained(root / name)
        save_tokenizer(root / name)
    return root


def opened(folder: Path) -> tuple[PretrainedTextEncoder, PretrainedTokenizer]:
    encoder = open_text_encoder(folder)
    assert isinstance(encoder, PretrainedTextEncoder)
    return encoder, PretrainedTokenizer.load(folder)


def tiny_pipeline_with(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(tiny_vae(), tiny_unet(), *opened(folder), NoiseSchedule(steps_offset=1))


@pytest.mark.parametrize("name", ["T5EncoderModel", "BertModel", "SiglipTextModel"])
def test_context_is_transformers_last_hidden_state_and_zero_in_the_padding(saved: Path, name: str) -> None:
    encoder, tokenizer = opened(saved / name)
    assert (encoder.class_name, encoder.hidden_size, tokenizer.max_length) == (name, 16, 12)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    ids = tokenizer(["a red apple", ""])
    assert ids.tolist() == [[3, 4, 6, 1] + [NO_TOKEN] * 8, [1] + [NO_TOKEN] * 11]
    with torch.no_grad():
        context = encoder(ids)
        alone = encoder.model(input_ids=ids[:1, :4]).last_hidden_state
    assert context.shape == (2, 12, 16)
    assert not context[0, 4:].any() and not context[1, 1:].any()
    # as the text gives without any padding
    torch.testing.assert_close(context[:1, :4], alone, rtol=1e-5, atol=1e-5)


def test_t5_is_that_of_transformers(saved: Path) -> None:
    encoder, tokenizer = opened(saved / "T5EncoderModel")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(saved / "T5EncoderModel")
    given = transformers.AutoTokenizer.from_pretrained(saved / "T5EncoderModel")(["a green boat"], return_tensors="pt")
    with torch.no_grad():
        expected = theirs.encoder(**{key: given[key] for key in ("input_ids", "attention_mask")}).last_hidden_state
        context = encoder(tokenizer(["a green boat"]))
    torch.testing.assert_close(context[:, :4], expected, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_without_a_mask_has_no_padding(saved: Path, tmp_path: Path) -> None:
    """SigLIP's: it was trained to read the padding."""
    save_tokenizer(tmp_path, model_input_names=["input_ids"])
    assert PretrainedTokenizer.load(tmp_path)(["a boat"]).tolist() == [[3, 7, 1] + [0] * 9]


def test_long_texts_are_cut_with_a_warning(saved: Path) -> None:
    tokenizer = PretrainedTokenizer.load(saved / "BertModel", max_length=4)
    with pytest.warns(UserWarning, match="prompt 'a red apple at night'... has 6 tokens, rows have 4: it is cut"):
        assert tokenizer(["a red apple at night"]).tolist() == [[3, 4, 6, 1]]
    with pytest.raises(ValueError, match="must be a list of strings"):
        tokenizer("a boat")


def test_open_text_encoder_opens_clip_as_our_own(tmp_path: Path) -> None:
    TextEncoder.from_config(SIZES, seed=0).save_pretrained(tmp_path)
    encoder = open_text_encoder(tmp_path)
    assert type(encoder) is TextEncoder and not encoder.training
    with pytest.raises(ValueError, match="describes a 'bert', not a CLIP text model"):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        TextEncoder.from_pretrained(tmp_path, frozen=True)


def test_what_cannot_be_opened_is_one_line(saved: Path, tmp_path: Path) -> None:
    encoder, _ = opened(saved / "BertModel")
    encoder.save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    cases = {
        "of the kind 'nonsense'": config | {"model_type": "nonsense"},
        r"of the kind \['clip', 'clip'\]": config | {"model_type": ["clip", "clip"]},
        "of the kind 'bart': transformers has no text encoder of it alone": {"model_type": "bart"},
        "does not fit BertModel: missing or of another shape encoder.layer.2": config | {"num_hidden_layers": 3},
    }
    for message, values in cases.items():
        (tmp_path / "bert" / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message) as error:
            open_text_encoder(tmp_path / "bert")
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^tokenizer '.*bert'") as error:
        PretrainedTokenizer.load(tmp_path / "bert")
    assert "\n" not in str(error.value)


def test_weights_and_clip_skip_are_refused(saved: Path) -> None:
    encoder, tokenizer = opened(saved / "T5EncoderModel")
    with pytest.raises(ValueError, match=r"prompt 'a \(red:1.2\) apple' has weights, which only CLIP's") as error:
        encode_prompts(encoder, tokenizer, ["a (red:1.2) apple"])
    assert "\n" not in str(error.value)
    plain = encode_prompts(encoder, tokenizer, ["a red apple", r"a (red) apple"])
    assert torch.equal(plain[0], encoder(tokenizer(["a red apple"]))[0])
    unread = encode_prompts(encoder, tokenizer, ["a (red:1.2) apple"], weights=False)
    assert torch.equal(unread, encoder(tokenizer(["a (red:1.2) apple"])))
    with pytest.raises(ValueError, match="clip_skip is 1, must be 0 with T5EncoderModel: only CLIP has it"):
        encode_prompts(encoder, tokenizer, ["a boat"], clip_skip=1)
    with pytest.raises(ValueError, match="clip_skip is 1, must be in 0 .. 0"):
        tiny_pipeline_with(saved / "T5EncoderModel")("a boat", clip_skip=1)


@pytest.mark.parametrize("name", ["T5EncoderModel", "BertModel"])
def test_a_pipeline_is_saved_and_opened_with_it(saved: Path, tmp_path: Path, name: str) -> None:
    pipeline = tiny_pipeline_with(saved / name)
    options = {"seed": 0, "num_inference_steps": 2, "guidance_scale": 3.0, "progress": False}
    images = pipeline(["a red apple"], negative_prompt="night", **options).images
    pipeline.save_pretrained(tmp_path / "saved")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again(["a red apple"], negative_prompt="night", **options).images[0].tobytes() == images[0].tobytes()
    digests = [text_digest(own.tokenizer, own.text_encoder) for own in (pipeline, again)]
    assert digests[0] == digests[1]
    # as transformers opens it
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", name]
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "saved" / "text_encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved" / "tokenizer")
    assert tokenizer.model_max_length == 12 and getattr(transformers, index["tokenizer"][1])
    given = tokenizer(["a red apple"], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    torch.testing.assert_close(pipeline.encode_prompts(["a red apple"])[:, :4], expected, rtol=1e-5, atol=1e-5)
    assert transformers.AutoModelForTextEncoding.from_pretrained(tmp_path / "saved" / "text_encoder").config.model_type


def test_what_stands_in_the_padding_does_not_reach_the_unet(saved: Path) -> None:
    encoder, tokenizer = opened(saved / "T5EncoderModel")
    ids = tokenizer(["a red apple"])
    changed = encoder.model(input_ids=ids.clamp_min(0) + 5 * (ids < 0), attention_mask=(ids >= 0).long())
    assert torch.equal(changed.last_hidden_state[:, :4], encoder(ids)[:, :4])
    assert not torch.equal(changed.last_hidden_state[:, 4:], encoder(ids)[:, 4:])

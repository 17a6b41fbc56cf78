"""Prompt encoding against diffusers (clip_skip) and against states combined by hand (weights, chunks)."""

import copy
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from model_pairs import transformers_twin
from tiny import SD1_SCHEDULER, UNET, VAE, normal, perturb, relative_error, tiny_text_encoder, tiny_unet, tokenizer
from torch import Tensor

from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.pipeline.prompts import encode_prompts, parse_weights

START, END = 49406, 49407
# tokens of whole words, as OpenAI's vocabulary has them
A, CAT, DOG = 320, 2368, 1929
# one word of three tokens: photo synthe sizing
LONG_WORD, LONG_WORD_IDS = "photosynthesizing", [1153, 22604, 28330]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """Four layers; their weights are noisy enough that the context depends on every token."""
    return perturb(tiny_text_encoder(num_hidden_layers=4)).eval()


@pytest.fixture(scope="module")
def short() -> CLIPTokenizer:
    """Rows of 8 tokens: a chunk has room for 6."""
    return CLIPTokenizer.load(max_length=8)


def row(*ids: int, length: int = 77) -> Tensor:
    """input_ids [1, length] of the given tokens, written by hand."""
    return torch.tensor([[START, *ids, END] + [END] * (length - 2 - len(ids))])


# ----------------------------------------------------------------------------------------------------------------------
# Reading the weights


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        # weights
        ("(a red hat:1.2)", [("a red hat", 1.2)]),
        ("a (red:1.2) hat", [("a ", 1), ("red", 1.2), (" hat", 1)]),
        ("(cat:1.2)(dog:0.5)", [("cat", 1.2), ("dog", 0.5)]),
        ("(cat:1.5) and (dog:1.5)", [("cat", 1.5), (" and ", 1), ("dog", 1.5)]),
        ("(a:0)(b:-1)(c:+.5)(d:2.)(e:1e-1)", [("a", 0), ("b", -1), ("c", 0.5), ("d", 2), ("e", 0.1)]),
        ("(cat: 1.2 )", [("cat", 1.2)]),
        ("( cat :1.2)", [(" cat ", 1.2)]),
        ("(cat:1)s", [("cat", 1), ("s", 1)]),
        # only the last number counts
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(at 10:30:2)", [("at 10:30", 2)]),
        # nesting
        ("((cat:1.5):2)", [("cat", 3)]),
        ("(a (red:3) hat:0.5) on", [("a ", 0.5), ("red", 1.5), (" hat", 0.5), (" on", 1)]),
        ("(a ((b:2) c:3) d:5)", [("a ", 5), ("b", 30), (" c", 15), (" d", 5)]),
        ("(a:(b:2):3)", [("a:", 3), ("b", 6)]),
        # parentheses without a number
        ("a dog (small)!", [("a dog (small)!", 1)]),
        ("((cat)) [dog]", [("((cat)) [dog]", 1)]),
        ("a (b (c:2) d) e", [("a (b ", 1), ("c", 2), (" d) e", 1)]),
        ("(the (small) cat:2)", [("the (small) cat", 2)]),
        # malformed, unbalanced
        ("(cat:1.2", [("(cat:1.2", 1)]),
        ("cat:1.2)", [("cat:1.2)", 1)]),
        ("(cat:big)", [("(cat:big)", 1)]),
        ("(cat:)", [("(cat:)", 1)]),
        (
            "(cat:1.2.3) (a:1,2) (b:0x1) (c:1_0) (d:--1) (e:٣)",
            [("(cat:1.2.3) (a:1,2) (b:0x1) (c:1_0) (d:--1) (e:٣)", 1)],
        ),
        ("(cat:nan) (dog:inf)", [("(cat:nan) (dog:inf)", 1)]),
        ("(cat 1.2)", [("(cat 1.2)", 1)]),
        ("a) (b (c:2)", [("a) (b ", 1), ("c", 2)]),
        ("(c:2)) :)", [("c", 2), (") :)", 1)]),
        # a weight on nothing
        ("a (:1.2) b", [("a (:1.2) b", 1)]),
        ("( :1.2)", [("( :1.2)", 1)]),
        ("()", [("()", 1)]),
        ("((:2)b:3)", [("(:2)b", 3)]),
        # escapes
        (r"a \(cat:1.2\)", [("a (cat:1.2)", 1)]),
        (r"(16\:9)", [("(16:9)", 1)]),
        (r"(cat\:2:1.5)", [("cat:2", 1.5)]),
        (r"(a \(b\) c:2)", [("a (b) c", 2)]),
        (r"(\(:2)", [("(", 2)]),
        (r"(cat:1.2\)", [("(cat:1.2)", 1)]),
        (r"back\slash \\ ¯\_", [(r"back\slash \\ ¯\_", 1)]),
        # unicode
        ("(ein Café im Süden:1.5) 猫(🦖 é:2)", [("ein Café im Süden", 1.5), (" 猫", 1), ("🦖 é", 2)]),
        ("（cat：1.2）", [("（cat：1.2）", 1)]),
    ],
)
def test_parse_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    pieces = parse_weights(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


def test_weights_are_finite() -> None:
    for prompt in ("(cat:1e999)", "((cat:1e200):1e200)"):
        with pytest.raises(ValueError, match="has the weight inf, must be a finite number") as error:
            parse_weights(prompt)
        assert prompt in str(error.value)


def test_parsing_takes_linear_time() -> None:
    many = 20_000
    assert parse_weights("(" * many) == [("(" * many, 1)]
    assert parse_weights("(a:" + "1" * 10 * many + "x)") == [("(a:" + "1" * 10 * many + "x)", 1)]
    assert parse_weights("(" * many + "a" + ":1)" * many) == [("a", 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Words


def test_words_are_the_tokens_of_a_row() -> None:
    assert tokenizer().words("A  Cat") == [[A], [CAT]]
    assert tokenizer().words(LONG_WORD) == [LONG_WORD_IDS]
    assert tokenizer().words(" \n") == []
    text = f"&lt;b&gt; It’s {LONG_WORD}, 12 \U0001f996\U0001f996 (dog)! café </w> <|endoftext|>"
    words = tokenizer().words(text)
    ids = [token_id for word in words for token_id in word]
    assert tokenizer()([text]).tolist() == row(*ids).tolist()
    # the digits, the two dinosaurs, and the signs of the special token are words
    assert len(words) == len("< b > it 's long , 1 2 TT ( dog )! café </ w > <| endoftext |>".split())


# ----------------------------------------------------------------------------------------------------------------------
# Plain prompts and clip_skip


@pytest.mark.parametrize("prompt", ["", "a red apple", "A dog (small), it’s &amp; 16:9!", "cat " * 75])
def test_a_plain_prompt_is_bit_equal(encoder: TextEncoder, prompt: str) -> None:
    context = encode_prompts(encoder, tokenizer(), [prompt])
    assert context.shape == (1, 77, 16)
    assert torch.equal(context, encoder(tokenizer()([prompt])))


def test_a_plain_batch_is_bit_equal(encoder: TextEncoder) -> None:
    prompts = ["a red apple", "", "green boat at night"]
    assert torch.equal(encode_prompts(encoder, tokenizer(), prompts), encoder(tokenizer()(prompts)))
    # repeated prompts too, which are encoded once
    repeated = encode_prompts(encoder, tokenizer(), ["a red apple", "a red apple", ""])
    assert torch.equal(repeated, encoder(tokenizer()(["a red apple", ""]))[[0, 0, 1]])


def test_plain_prompts_keep_the_padding_of_stable_diffusion_2(encoder: TextEncoder, tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    (tmp_path / "tokenizer_config.json").unlink()
    other = CLIPTokenizer.load(tmp_path)
    assert other.pad_token_id == 0
    ids = torch.tensor([[START, CAT, END] + [0] * 74, [START, END] + [0] * 75])
    state, empty = encoder(ids)
    assert torch.equal(encode_prompts(encoder, other, ["cat"]), encoder(ids[:1]))
    expected = state.clone()
    expected[1] = empty[1] + 3 * (state[1] - empty[1])
    torch.testing.assert_close(encode_prompts(encoder, other, ["(cat:3)"])[0], expected, rtol=1e-5, atol=1e-6)


def test_clip_skip_is_that_of_diffusers(encoder: TextEncoder, tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    twin = transformers_twin(encoder)
    theirs = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        unet=diffusers.UNet2DConditionModel(**UNET),
        text_encoder=twin,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path),
        scheduler=diffusers.PNDMScheduler(**SD1_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Asked for clip_skip, diffusers looks for the layers where transformers had them before 5.6
    if not hasattr(twin, "text_model"):
        vars(twin)["text_model"] = twin
    prompts = ["a red apple", "green boat at night"]
    previous = None
    for clip_skip in range(4):
        context = encode_prompts(encoder, tokenizer(), prompts, clip_skip=clip_skip)
        expected, _ = theirs.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip)
        assert relative_error(context, expected) < 1e-6
        assert previous is None or relative_error(context, previous) > 0.01
        previous = context


def test_clip_skip_by_hand(encoder: TextEncoder) -> None:
    """The encoder without its last layers, cut off by hand."""
    cut = perturb(tiny_text_encoder(num_hidden_layers=4)).eval()
    del cut.model.encoder.layers[2:]
    input_ids = tokenizer()(["a red apple"])
    torch.testing.assert_close(encoder(input_ids, clip_skip=2), cut(input_ids), rtol=0, atol=1e-6)
    # the default is the old path
    assert torch.equal(encoder(input_ids), encoder(input_ids, 0))


@pytest.mark.parametrize("value", [-1, 4, 1.0, None, "1"])
def test_clip_skip_out_of_range(encoder: TextEncoder, value: object) -> None:
    with pytest.raises(ValueError, match=r"in 0 \.\. 3 \(the text encoder has 4 layers\)") as error:
        encode_prompts(encoder, tokenizer(), ["a cat"], clip_skip=value)
    assert f"clip_skip is {value!r}" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def test_weights_by_hand(encoder: TextEncoder) -> None:
    """a cat dog: the states of "cat" and "dog" move on the line through the empty prompt's, nothing else moves."""
    for clip_skip in (0, 1):
        state, empty = encoder(torch.cat([row(A, CAT, DOG), row()]), clip_skip)
        expected = state.clone()
        expected[2] = empty[2] + 1.5 * (state[2] - empty[2])
        expected[3] = empty[3] - 0.25 * (state[3] - empty[3])
        context = encode_prompts(encoder, tokenizer(), ["a (cat:1.5) (dog:-0.25)"], clip_skip=clip_skip)[0]
        torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(context[:2], state[:2]) and torch.equal(context[4:], state[4:])
        assert relative_error(context[2:4], state[2:4]) > 0.1


def test_weight_zero_is_the_unconditional_prompt_there(encoder: TextEncoder) -> None:
    state, empty = encoder(torch.cat([row(A, CAT), row()]))
    context = encode_prompts(encoder, tokenizer(), ["a (cat:0)"])[0]
    assert torch.equal(context[2], empty[2])
    assert torch.equal(context[3:], state[3:])


def test_nested_weights_and_words_of_several_tokens(encoder: TextEncoder) -> None:
    state, empty = encoder(torch.cat([row(A, *LONG_WORD_IDS, CAT), row()]))
    weights = torch.ones(77, 1)
    weights[1:6, 0] = torch.tensor([0.5, 1.5, 1.5, 1.5, 0.5])
    context = encode_prompts(encoder, tokenizer(), [f"(a ({LONG_WORD}:3) cat:0.5)"])[0]
    torch.testing.assert_close(context, empty + weights * (state - empty), rtol=1e-5, atol=1e-6)


def test_weights_of_one_change_nothing(encoder: TextEncoder) -> None:
    expected = encoder(tokenizer()(["a red cat"]))
    assert torch.equal(encode_prompts(encoder, tokenizer(), ["a (red:1) (cat:1.0)"]), expected)
    # beside a weighted prompt too
    both = encode_prompts(encoder, tokenizer(), ["a red cat", "a (red:2) cat"])
    torch.testing.assert_close(both[0], expected[0], rtol=0, atol=1e-6)


def test_a_piece_ends_a_word(encoder: TextEncoder) -> None:
    context = encode_prompts(encoder, tokenizer(), ["(cat:1)s"])
    assert torch.equal(context, encoder(tokenizer()(["cat s"])))
    assert not torch.equal(context, encoder(tokenizer()(["cats"])))


def test_escapes_reach_the_encoder_as_signs(encoder: TextEncoder) -> None:
    context = encode_prompts(encoder, tokenizer(), [r"a \(cat:1.2\) (16\:9)"])
    assert torch.equal(context, encoder(tokenizer()(["a (cat:1.2) (16:9)"])))


def test_weights_in_bfloat16(encoder: TextEncoder) -> None:
    """1.1 is no bfloat16: the sum is taken in float32 and rounded once."""
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    state, empty = half(torch.cat([row(CAT), row()]))
    context = encode_prompts(half, tokenizer(), ["(cat:1.1)"])[0]
    assert context.dtype == torch.bfloat16
    expected = empty[1].float() + 1.1 * (state[1].float() - empty[1].float())
    assert torch.equal(context[1], expected.to(torch.bfloat16))
    assert torch.equal(context[2:], state[2:])


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, "1e39"), (torch.float16, "-1e6")])
def test_weights_beyond_the_number_type(encoder: TextEncoder, dtype: torch.dtype, weight: str) -> None:
    with pytest.raises(ValueError, match=f"takes the context out of {dtype}'s range") as error:
        encode_prompts(copy.deepcopy(encoder).to(dtype), tokenizer(), [f"a (cat:{weight}) (dog:2)"])
    assert f"the weight {float(weight)}" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Chunks


def test_chunks_by_hand(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    """Room for 6: the word of three tokens does not fit behind four, and 7 words of one token are 6 + 1."""
    prompts = [f"a cat a dog {LONG_WORD} a", "cat a cat a cat a dog", "a a a a a a a a a a a a"]
    rows = [
        row(A, CAT, A, DOG, length=8),
        row(*LONG_WORD_IDS, A, length=8),
        row(CAT, A, CAT, A, CAT, A, length=8),
        row(DOG, length=8),
        row(*[A] * 6, length=8),
        row(*[A] * 6, length=8),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is cut off
        context = encode_prompts(encoder, short, prompts)
    states = [encoder(one)[0] for one in rows]
    expected = torch.stack([torch.cat(states[i : i + 2]) for i in (0, 2, 4)])
    assert context.shape == (3, 16, 16)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)


def test_what_just_fits_is_one_chunk(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    for prompt, ids in [("a cat a dog a cat", (A, CAT, A, DOG, A, CAT)), (f"a {LONG_WORD} a a", None)]:
        context = encode_prompts(encoder, short, [prompt])
        assert torch.equal(context, encoder(row(*(ids or (A, *LONG_WORD_IDS, A, A)), length=8)))
    assert encode_prompts(encoder, short, [f"a {LONG_WORD} a a a"]).shape == (1, 16, 16)


def test_only_a_word_longer_than_a_chunk_is_cut(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    word = "\U0001f996" * 5  # one word: signs in a row
    (ids,) = short.words(word)
    assert 6 < len(ids) <= 12
    context = encode_prompts(encoder, short, [f"a {word} cat"])
    rows = [row(A, length=8), row(*ids[:6], length=8), row(*ids[6:], CAT, length=8)]
    torch.testing.assert_close(context, encoder(torch.cat(rows)).reshape(1, 24, 16), rtol=0, atol=1e-6)


def test_two_hundred_tokens(encoder: TextEncoder) -> None:
    """75 + 75 + 50 tokens."""
    words = [CAT, DOG, A, DOG] * 50
    prompt = "cat dog a dog " * 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = encode_prompts(encoder, tokenizer(), [prompt])
    expected = encoder(torch.cat([row(*words[:75]), row(*words[75:150]), row(*words[150:])]))
    assert context.shape == (1, 231, 16)
    torch.testing.assert_close(context[0], expected.reshape(231, 16), rtol=0, atol=1e-6)


def test_weights_in_a_later_chunk(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    """A weight over the border: the last token of the first chunk and the first of the second have it."""
    context = encode_prompts(encoder, short, ["a a a a a (cat dog:1.5) a (cat:0.5)"])[0]
    first, second, empty = encoder(
        torch.cat([row(A, A, A, A, A, CAT, length=8), row(DOG, A, CAT, length=8), row(length=8)])
    )
    expected = torch.cat([first, second])
    expected[6] = empty[6] + 1.5 * (first[6] - empty[6])
    expected[8 + 1] = empty[1] + 1.5 * (second[1] - empty[1])
    expected[8 + 3] = empty[3] + 0.5 * (second[3] - empty[3])
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_is_its_prompts_alone(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    """Each is repeated up to the common length, of 1, 2 and 3 chunks 6."""
    prompts = ["a cat", "a (cat:2) (dog:-1)", "cat " * 15, "", "dog " * 12]
    together = encode_prompts(encoder, short, prompts)
    assert together.shape == (5, 48, 16)
    for prompt, context in zip(prompts, together, strict=True):
        alone = encode_prompts(encoder, short, [prompt])[0]
        torch.testing.assert_close(context, alone.repeat(48 // len(alone), 1), rtol=0, atol=1e-6)


def test_attention_to_repeated_states_is_attention_to_the_states(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    unet = perturb(tiny_unet(cross_attention_dim=16))
    latents, timesteps = normal(1, 4, 8, 8, seed=1), torch.tensor([500])
    alone = encode_prompts(encoder, short, ["a cat"])
    beside, _ = encode_prompts(encoder, short, ["a cat", "dog " * 15])
    with torch.no_grad():
        expected, output = (unet(latents, timesteps, context) for context in (alone, beside[None]))
        other = unet(latents, timesteps, encode_prompts(encoder, short, ["a dog"]))
    assert (output - expected).abs().max() < 1e-5 < (other - expected).abs().max()


def test_weights_can_be_left_unread(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    plain = encode_prompts(encoder, short, ["(cat:2)"], weights=False)
    torch.testing.assert_close(plain, encode_prompts(encoder, short, [r"\(cat\:2\)"]), rtol=0, atol=0)
    assert not torch.equal(plain, encode_prompts(encoder, short, ["(cat:2)"]))


def test_length_has_limits(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    assert encode_prompts(encoder, short, ["a " * 6 * 32]).shape == (1, 32 * 8, 16)
    with pytest.raises(ValueError, match="longest prompt has 33 chunks of 6 tokens, a context holds at most 32$"):
        encode_prompts(encoder, short, ["a " * (6 * 32 + 1)])
    with pytest.raises(ValueError, match=r"longest prompt has 7 .* prompts of \[5, 7\] chunks in one call need 35"):
        encode_prompts(encoder, short, ["a " * 30, "a " * 42])
    with pytest.raises(ValueError, match=r"prompts\[1\] has 1,000,000 characters, must have at most 100,000"):
        encode_prompts(encoder, short, ["a", "a" * 10**6])


def test_each_row_is_encoded_once(encoder: TextEncoder, short: CLIPTokenizer) -> None:
    batches = []
    handle = encoder.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
    try:
        encode_prompts(encoder, short, ["a cat", "(dog:2)", "", "a cat", "a a a a a a cat", ""])
    finally:
        handle.remove()
    (input_ids,) = batches
    expected = [row(A, CAT, length=8), row(DOG, length=8), row(length=8), row(*[A] * 6, length=8), row(CAT, length=8)]
    assert torch.equal(input_ids, torch.cat(expected))


# ----------------------------------------------------------------------------------------------------------------------
# Wrong inputs


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts is 'a cat', must be a list of strings"),
        (None, "prompts is None, must be a list"),
        (3, "prompts is 3, must be a list"),
        ([], "prompts is an empty list"),
        (["a cat", None], r"prompts\[1\] is None \(NoneType\), must be a string"),
        (["a cat", ["b"]], r"prompts\[1\] is \['b'\] \(list\)"),
    ],
)
def test_wrong_prompts(encoder: TextEncoder, prompts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompts(encoder, tokenizer(), prompts)

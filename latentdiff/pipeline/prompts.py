"""Prompts of any length, with weights on parts of them, to the context that the UNet reads."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from latentdiff.models.pretrained_text import AnyTextEncoder, PretrainedTokenizer, Tokenizer
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.pipeline.options import Request

# what the weight syntax reads; an escaped sign is one match, so it can't be taken for the sign itself
_SIGN = re.compile(r"\\[():]|[():]")
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
_Token = tuple[int, float]  # id, weight
MAX_CHUNKS = 32  # of a context; Stable Diffusion's are 77 tokens each
MAX_CHARACTERS = 100_000  # of a prompt, far more than those chunks hold


def encode_prompts(
    text_encoder: AnyTextEncoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    clip_skip: int = 0,
    weights: bool = True,
) -> Tensor:
    """Encode `prompts` to context [B, L * chunks, D], L the tokenizer's `max_length`, on the encoder's device.

    Weights: a token of weight w gets the state empty + w * (state - empty), empty being the state of the empty prompt
    at the same place of the row (ComfyUI's reading of weights); start, end and padding stay as they are. See
    `parse_weights` for how they are written. A prompt without weights gives what `text_encoder(tokenizer([prompt]))`
    gives.

    Length: a prompt of more than L - 2 tokens is read in chunks, each a row of its own with start, end and padding,
    encoded alone. A word is never cut, unless it is longer than a chunk. Where prompts need different numbers of
    chunks, each is repeated until all are of one length: attention to repeated states gives what attention to the
    states gives, so what a prompt means does not depend on the others.

    clip_skip: last layers of the text encoder to leave out, in 0 .. max_clip_skip, see `TextEncoder.forward`.
    weights: read weights; False takes `(text:1.2)` as it stands.

    With another text encoder than CLIP a prompt is one row, cut if it is too long, and weights are an error.

    Raises ValueError if `prompts` is not a list of strings or is empty, for a clip_skip or a weight out of range, and
    if the context would have more than MAX_CHUNKS chunks.
    """
    _check_prompts(prompts)
    device = next(text_encoder.parameters()).device
    if isinstance(tokenizer, PretrainedTokenizer):
        texts = [_without_weights(prompt) for prompt in prompts] if weights else prompts
        return text_encoder(tokenizer(texts).to(device), clip_skip)
    room = tokenizer.max_length - 2
    chunked = [_chunks(_weighted_words(tokenizer, prompt, weights), room) for prompt in prompts]
    lengths = sorted({len(own) for own in chunked})
    num_chunks = math.lcm(*lengths)
    if num_chunks > MAX_CHUNKS:
        several = f"; prompts of {lengths} chunks in one call need {num_chunks}" if len(lengths) > 1 else ""
        raise ValueError(
            f"the longest prompt has {lengths[-1]} chunks of {room} tokens, a context holds at most {MAX_CHUNKS}"
            + several
        )
    chunks = [chunk for own in chunked for chunk in own * (num_chunks // len(own))]
    rows = [tuple(tokenizer.row([token_id for token_id, _ in chunk])) for chunk in chunks]
    weighted = any(weight != 1.0 for chunk in chunks for _, weight in chunk)
    empty_row = tuple(tokenizer.row([]))

    # Each different row is encoded once: negative prompts, fillings and several images of a prompt repeat them
    places = {row: place for place, row in enumerate(dict.fromkeys([*rows, empty_row] if weighted else rows))}
    states = text_encoder(torch.tensor(list(places), device=device), clip_skip)
    context = states[[places[row] for row in rows]]
    if weighted:
        context = _apply_weights(context, states[places[empty_row]], chunks)
    return context.reshape(len(prompts), num_chunks * tokenizer.max_length, -1)


def encode_pair(encode: Callable[[Sequence[str], int, bool], Tensor], request: Request) -> tuple[Tensor, Tensor | None]:
    """Context of a request's prompts and, with guidance, of its negative prompts, of one length: [B, L, D] each.

    encode(texts, clip_skip, weights): texts -> context.
    Raises ValueError if given prompt_embeds have another number of tokens than the negative prompt.
    """
    given, negative = request.options.prompt_embeds, request.options.negative_prompt_embeds
    reading, guided = (request.options.clip_skip, request.options.prompt_weights), request.guidance.wanted
    texts = [] if given is not None else list(request.prompts)
    if guided and negative is None:
        texts += request.negatives
    states = encode(texts, *reading) if texts else None
    if given is None:
        assert states is not None
        given, states = states[: request.count], states[request.count :]
    if not guided:
        return given, None
    if negative is None:
        assert states is not None
        # Repeated up to the length of given states, as `encode_prompts` does.
        times, rest = divmod(given.shape[1], states.shape[1])
        negative = states if rest else states.repeat(1, times, 1)
    if negative.shape[1] != given.shape[1]:
        raise ValueError(
            f"prompt_embeds have {given.shape[1]} tokens, those of the negative prompt {negative.shape[1]}: give "
            "negative_prompt_embeds of the same length"
        )
    return given, negative


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split `prompt` into pieces of one weight each: "a (red:1.2) hat" -> [("a ", 1), ("red", 1.2), (" hat", 1)].

    `(text:number)` gives the text that weight, any finite number; nested weights multiply. `\(`, `\)` and `\:` stand
    for the signs themselves. All else is plain text and stays as written: parentheses without a number, unbalanced
    ones, a weight on nothing. A weight's number comes last in its parentheses, so "(16:9)" is one and "(16\:9)" is not.
    Raises ValueError if a weight is too large for a float.
    """
    numbers = _find_weights(prompt)
    pieces: list[tuple[str, float]] = []
    open_weights = [1.0]
    text: list[str] = []
    position = 0

    def finish_piece() -> None:
        if any(text):
            pieces.append(("".join(text), open_weights[-1]))
        text.clear()

    for sign in _SIGN.finditer(prompt):
        if sign.start() < position:
            continue  # the closing parenthesis of a weight, read with its number
        text.append(prompt[position : sign.start()])
        position = sign.end()
        number = numbers.get(sign.start())
        if number is None:
            text.append(sign[0][-1])
        elif sign[0] == "(":
            finish_piece()
            open_weights.append(open_weights[-1] * number[0])
            if not math.isfinite(open_weights[-1]):
                raise ValueError(f"prompt {prompt!r:.80} has the weight {open_weights[-1]}, must be a finite number")
        else:
            finish_piece()
            open_weights.pop()
            position = number[1]
    text.append(prompt[position:])
    finish_piece()
    return pieces


def _find_weights(prompt: str) -> dict[int, tuple[float, int]]:
    """Find `(text:number)`: position of its "(", and of its ":", -> (the number, position after its ")")."""
    found: dict[int, tuple[float, int]] = {}
    open_groups: list[list[int]] = []  # position of the "(", and of the last ":" inside (or again of the "(")
    for sign in _SIGN.finditer(prompt):
        if sign[0] == "(":
            open_groups.append([sign.start(), sign.start()])
        elif sign[0] == ":" and open_groups:
            open_groups[-1][1] = sign.start()
        elif sign[0] == ")" and open_groups:
            start, colon = open_groups.pop()
            if prompt[start + 1 : colon].strip() and _NUMBER.fullmatch(prompt, colon + 1, sign.start()):
                found[start] = found[colon] = float(prompt[colon + 1 : sign.start()]), sign.end()
    return found


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is {prompts!r:.80}, must be a list of strings")
    if not prompts:
        raise ValueError("prompts is an empty list, must hold at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{i}] is {prompt!r:.80} ({type(prompt).__name__}), must be a string")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"prompts[{i}] has {len(prompt):,} characters, must have at most {MAX_CHARACTERS:,}")


def _without_weights(prompt: str) -> str:
    pieces = parse_weights(prompt)
    if any(weight != 1.0 for _, weight in pieces):
        raise ValueError(
            f"prompt {prompt!r:.80} has weights, which only CLIP's text encoder has: leave them out, or set "
            "prompt_weights=False to take it as it stands"
        )
    return "".join(text for text, _ in pieces)


def _weighted_words(tokenizer: CLIPTokenizer, prompt: str, weights: bool) -> Iterator[list[_Token]]:
    """The tokens of each word; the pieces are tokenized one by one, so a piece's end is a word's end."""
    for text, weight in parse_weights(prompt) if weights else [(prompt, 1.0)]:
        for word in tokenizer.words(text):
            yield [(token_id, weight) for token_id in word]


def _chunks(words: Iterable[list[_Token]], room: int) -> list[list[_Token]]:
    """Fill chunks of at most `room` tokens with whole words; no words are one empty chunk."""
    chunks: list[list[_Token]] = [[]]
    for word in words:
        for start in range(0, len(word), room):  # one round, unless the word is longer than a chunk
            part = word[start : start + room]
            if len(chunks[-1]) + len(part) > room:
                chunks.append([])
            chunks[-1].extend(part)
    return chunks


def _apply_weights(context: Tensor, empty: Tensor, chunks: Sequence[Sequence[_Token]]) -> Tensor:
    """Weigh context [N, L, D] of N chunks against empty [L, D]; a state of weight 1 keeps its bits."""
    length = len(empty)
    rows = [[1.0, *(weight for _, weight in chunk), *[1.0] * (length - 1 - len(chunk))] for chunk in chunks]
    dtype = torch.promote_types(context.dtype, torch.float32)  # at least float32: bfloat16 knows no 1.1
    weights = torch.tensor(rows, dtype=dtype, device=context.device)[..., None]
    moved = (empty + weights * (context.to(dtype) - empty)).to(context.dtype)
    weighed = torch.where(weights == 1, context, moved)
    if not weighed.isfinite().all():
        largest = max((weight for chunk in chunks for _, weight in chunk), key=abs)
        raise ValueError(f"the weight {largest} takes the context out of {context.dtype}'s range, use a smaller one")
    return weighed

"""Tiny text encoders of transformers other than CLIP, with a tokenizer of ten words."""

from pathlib import Path

import tokenizers
import transformers
from tokenizers import processors

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "apple", "boat", "at", "night"]
T5 = {"vocab_size": 10, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def save_tokenizer(folder: Path, **settings: object) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 12, **settings},
    ).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    """A whole T5, of random weights, with its tokenizer."""
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(folder)
    save_tokenizer(folder)

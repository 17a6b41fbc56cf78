"""Tokenizer and text encoder, made and saved once."""

from pathlib import Path

import pytest
from tiny import tiny_text_encoder

from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.load()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny_text_encoder(seed=3, hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def saved_tokenizer(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder

"""The encoding against transformers' GPT-2 tokenizer, and its files."""

import tempfile
from pathlib import Path

import pytest
import tiktoken
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from support import tokenizer
from support.cli import UserError


def test_known_texts_have_known_ids() -> None:
    enc = tokenizer.get_encoding()
    assert isinstance(enc, tiktoken.Encoding)
    assert enc.n_vocab == tokenizer.VOCAB_SIZE == 50257
    # The example of GPT-2's README and of build-nanogpt.
    assert enc.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert enc.encode("<|endoftext|>", allowed_special="all") == [tokenizer.END_OF_TEXT_ID] == [50256]
    assert 50256 not in enc.encode_ordinary("<|endoftext|>")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_ids_equal_those_of_transformers_for_any_text(
    exported: transformers.PreTrainedTokenizerBase, text: str
) -> None:
    text = text.replace("<|endoftext|>", "")
    ids = tokenizer.get_encoding().encode_ordinary(text)
    assert exported(text)["input_ids"] == ids
    assert tokenizer.get_encoding().decode(ids) == text


def test_exported_files_know_the_end_of_text(exported: transformers.PreTrainedTokenizerBase) -> None:
    assert exported.eos_token_id == exported.bos_token_id == 50256
    assert exported("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
    assert exported.model_max_length == 1024
    assert len(exported) == 50257


def test_no_copy_of_the_ranks_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's loader would read its copy the next time, whoever wrote it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer.get_encoding.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_an_altered_rank_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(tokenizer.RANKS_FILE.read_bytes().replace(b"IQ== 0", b"IQ== 1", 1))
    monkeypatch.setattr(tokenizer, "RANKS_FILE", altered)
    tokenizer.get_encoding.cache_clear()
    with pytest.raises(UserError, match="not GPT-2's ranks"):
        tokenizer.get_encoding()
    tokenizer.get_encoding.cache_clear()

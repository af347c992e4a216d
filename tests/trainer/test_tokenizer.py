"""The tokenizer loses nothing, and the same text trains the same one."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig

CORPUS = [Path(__file__).read_text(encoding="utf-8"), "for x in range(10):\n    print(x)\n" * 50]
TOKENIZER = SentencePiece.train(CORPUS, TokenizerConfig(vocab_size=330))


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\r\u2581\u00a0\u3000\0")), max_size=30))
def test_decode_undoes_encode(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_text_never_encodes_to_the_end_of_a_document() -> None:
    assert TOKENIZER.end_of_document not in TOKENIZER.encode("<eod> </s> <unk>")


def test_training_is_deterministic() -> None:
    assert SentencePiece.train(CORPUS, TokenizerConfig(vocab_size=330)).sha256 == TOKENIZER.sha256


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.model").sha256 == TOKENIZER.sha256


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("text", "size", "sentence"),
    [
        ("a b c\n", 300, "the text is too small for a vocabulary of 300; use more text, or give"),
        ("\n", 300, "the text is too small for a vocabulary of 300; use more text, or give"),
        (CORPUS[0], 100_000, r"too small for a vocabulary of 100000; use --vocab-size \d+ or less, more text, or give"),
        ("".join(map(chr, range(0x4E00, 0x5000))), 300, r"too many .* of 300; use --vocab-size \d{3} or more, or give"),
    ],
    ids=["small", "nothing", "large vocabulary", "many characters"],
)
def test_texts_that_do_not_go_with_the_size(kind: str, text: str, size: int, sentence: str) -> None:
    """One sentence without SentencePiece's own file and line, and the way out that it names is one."""
    with pytest.raises(ValueError, match=sentence + " a tokenizer that exists with --tokenizer$") as caught:
        SentencePiece.train([text], TokenizerConfig(size, kind))
    if named := re.search(r"--vocab-size (\d+)", str(caught.value)):
        assert SentencePiece.train([text], TokenizerConfig(int(named[1]), kind)).vocab_size == int(named[1])


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "junk.model")
    with pytest.raises(ValueError, match="kinds are bpe and unigram"):
        TokenizerConfig(kind="wordpiece")

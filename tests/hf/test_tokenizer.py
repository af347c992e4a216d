"""A SentencePiece model as a Hugging Face tokenizer: the same tokens for every text."""

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from models.hf.tokenizer import SAMPLE, export_tokenizer
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig

TEXTS = [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))]
AWKWARD = [
    "",
    " ",
    "   two",
    "end  ",
    "a\r\n\tb",
    "\x00",
    "<eod> <unk> <0x41>",
    "\u7e54\u308b \U0001f9f5",
    "0123456789",
    SAMPLE,
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_of_ours(tmp_path: Path, kind: str) -> None:
    ours = SentencePiece.train(TEXTS, TokenizerConfig(vocab_size=500, kind=kind))
    ours.save(tmp_path)
    exported = export_tokenizer(str(tmp_path / "tokenizer.model"), tmp_path, 500, max_length=32)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (exported.bos_id, exported.eos_id, exported.pad_id) == (
        None,
        ours.end_of_document,
        theirs.token_to_id("<unk>"),
    )
    assert exported.sample_ids == ours.encode(SAMPLE)
    for text in TEXTS + AWKWARD:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_texts_of_unequal_length_make_a_batch(tmp_path: Path) -> None:
    SentencePiece.train(TEXTS, TokenizerConfig(vocab_size=500)).save(tmp_path)
    export_tokenizer(str(tmp_path / "tokenizer.model"), tmp_path, 500, max_length=None)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["one", "one and two"], padding=True, padding_side="left")
    assert len({len(row) for row in batch["input_ids"]}) == 1
    assert 0 in batch["attention_mask"][0] and 0 not in batch["attention_mask"][1]


def test_a_tokenizer_that_begins_every_text_with_a_space(tmp_path: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "given.model").write_bytes(out.getvalue())
    exported = export_tokenizer(str(tmp_path / "given.model"), tmp_path, 500, max_length=None)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert (exported.bos_id, exported.eos_id) == (1, 2)
    assert theirs.encode(SAMPLE, add_special_tokens=False).ids == exported.sample_ids
    assert theirs.decode(exported.sample_ids or []) == SAMPLE


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    SentencePiece.train(TEXTS, TokenizerConfig(vocab_size=500)).save(tmp_path)
    with pytest.raises(ValueError, match="has 500 tokens and the model 400"):
        export_tokenizer(str(tmp_path / "tokenizer.model"), tmp_path, 400, max_length=None)
    with pytest.raises(ValueError, match="does not exist"):
        export_tokenizer(str(tmp_path / "missing.model"), tmp_path, 400, max_length=None)

"""Sequences of a stream, with and without overlap, and streams of text."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.loss import IGNORE
from tests.trainer import runs
from trainer.data.sequences import Sequences
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer

LENGTHS = (3, 1, 17, 5, 9, 1, 2)


def stream() -> Stream:
    """Documents whose tokens are their places."""
    lengths = np.array(LENGTHS)
    return Stream("made", np.arange(lengths.sum()), lengths.cumsum() - lengths)


@pytest.mark.parametrize(("length", "overlap"), [(a, b) for a in (1, 4, 7, 38, 50) for b in (0, 1, 3, 6) if b < a])
def test_every_token_is_predicted_once_from_enough_before_it(length: int, overlap: int) -> None:
    stride, data, seen = length - overlap, stream(), []
    sequences = Sequences(data, length, stride)
    for index in range(len(sequences)):
        row = sequences.rows([index])
        tokens, targets, documents, positions = (x[0].tolist() for x in row.side().values())
        for place, target in enumerate(targets):
            if target == IGNORE:
                continue
            seen.append(target)
            # The tokens that it is predicted from are those right before it, of its document alone.
            context = [t for t, d in zip(tokens[: place + 1], documents, strict=False) if d == documents[place]]
            start = int(data.starts[np.searchsorted(data.starts, target, side="right") - 1])
            of_document = target - start + 1  # with the end of the document before it
            assert len(context) >= min(overlap, of_document)
            assert context == [(target - len(context) + i) % len(data) for i in range(len(context))]
            assert positions[place] == len(context) - 1
        assert sequences.predicted(index + 1) == len(seen)
    assert seen == list(range(len(data)))
    assert (sequences.rows([len(sequences)]).targets == IGNORE).all()
    rows = sequences.rows(range(len(sequences)))
    assert rows.documents is not None
    assert int((rows.documents >= 0).all(1).sum()) == sequences.full


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("run"))


def test_text_gives_the_tokens_that_prepare_gives(data: Path, tmp_path: Path) -> None:
    """Of every document, whatever kind of file it stands in."""
    prepared, tokenizer = Stream.open(str(data / "train")), Tokenizer.load(data / "tokenizer.model")
    ends = [*prepared.starts[1:], len(prepared)]
    texts = [tokenizer.decode(prepared.tokens[a : b - 1].tolist()) for a, b in zip(prepared.starts, ends, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in [*texts[:5], ""]))
    for number, text in enumerate(texts[5:]):
        (tmp_path / f"b{number:02}.txt").write_text(text)
    out = io.StringIO()
    found = Stream.encode([str(tmp_path)], "body", tokenizer, Console(file=out, width=200))
    assert np.array_equal(found.tokens, prepared.tokens)
    assert np.array_equal(found.starts, prepared.starts)
    assert found.bytes == prepared.bytes == sum(map(len, texts))
    assert "documents passed over, because they are empty or not UTF-8: 1" in out.getvalue()


def test_the_bytes_of_a_part_are_those_of_its_text(tmp_path: Path, data: Path) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    texts = ["the warp \u7e54\u308b", "weft"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    found = Stream.encode([str(tmp_path)], "text", tokenizer, Console(quiet=True))
    first = int(found.starts[1])
    assert found.text_bytes(len(found), None) == len("".join(texts).encode())
    assert found.text_bytes(first, tokenizer) == found.text_bytes(first - 1, tokenizer) == len(texts[0].encode())
    # Without the last of its three bytes, a character is none; the tokenizer has no piece for it.
    assert found.text_bytes(first - 2, tokenizer) == len(texts[0].encode()) - 3
    assert found.text_bytes(first, None) is None
    without = Stream(found.name, found.tokens, found.starts)
    assert without.text_bytes(len(found), tokenizer) == len("".join(texts).encode())

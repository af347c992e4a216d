"""Data: prepared text comes back, every token is predicted once, and the order knows nothing of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.loss import IGNORE
from trainer.data.manifest import read_manifest
from trainer.data.order import permute, slots
from trainer.data.prepare import PrepareConfig, prepare
from trainer.data.sequences import Sequences
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizers.sentencepiece import TokenizerConfig
from trainer.data.training import TrainingData, share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of 40 small texts, of which two are equal, one is not UTF-8 and one is empty."""
    root = tmp_path_factory.mktemp("data")
    (root / "text").mkdir()
    for i in range(40):
        body = "".join(f"def function_{i}_{j}(x):\n    return x + {j}\r\n" for j in range(i % 7 + 1))
        (root / "text" / f"{i:02}.py").write_bytes(body.encode())
    (root / "text" / "copy.py").write_bytes((root / "text" / "03.py").read_bytes())
    (root / "text" / "latin.py").write_bytes(b"caf\xe9\n")
    (root / "text" / "empty.py").write_bytes(b"")
    prepare(PrepareConfig((str(root / "text"),), TokenizerConfig(320), valid_bytes=600), root / "out")
    return root


def test_manifest(folder: Path) -> None:
    manifest = read_manifest(str(folder / "out" / "train"))
    assert manifest is not None
    splits = manifest["splits"]
    assert manifest["skipped"] == 2
    assert splits["train"]["documents"] + splits["valid"]["documents"] == 41
    total = sum(file.stat().st_size for file in (folder / "text").iterdir()) - len(b"caf\xe9\n")
    assert splits["train"]["bytes"] + splits["valid"]["bytes"] == total
    assert 600 <= splits["valid"]["bytes"] < 1200
    assert not (folder / "out.partial").exists()


def test_text_comes_back(folder: Path) -> None:
    """Both splits together hold every document, and equal documents are on one side."""
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer.model")
    found: dict[str, list[str]] = {}
    for split in ("train", "valid"):
        sequences = Sequences(str(folder / "out" / split), 64)
        targets = sequences.rows(range(len(sequences))).targets.flatten()
        stream = targets[targets != IGNORE].tolist()
        assert len(stream) == sequences.tokens
        text = "\0".join(tokenizer.decode(part) for part in split_at(stream, tokenizer.end_of_document))
        found[split] = text.split("\0")
    texts = sorted(file.read_bytes().decode() for file in (folder / "text").glob("[0-9c]*.py"))
    assert sorted(found["train"] + found["valid"]) == texts
    assert not set(found["train"]) & set(found["valid"])


def split_at(stream: list[int], mark: int) -> list[list[int]]:
    assert stream[-1] == mark
    parts: list[list[int]] = [[]]
    for token in stream[:-1]:
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_rows_begin_documents_with_the_end_of_the_last(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer.model")
    sequences = Sequences(str(folder / "out" / "train"), 50)
    batch = sequences.rows(range(len(sequences) + 1))
    assert batch.documents is not None and batch.positions is not None
    stream_in, stream_out = batch.tokens.flatten(), batch.targets.flatten()
    documents, positions = batch.documents, batch.positions
    assert torch.equal(stream_in[1 : sequences.tokens], stream_out[: sequences.tokens - 1])
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    inside = documents >= 0
    assert (batch.tokens[starts & inside] == tokenizer.end_of_document).all()
    assert (positions[starts & inside] == 0).all()
    assert stream_in[0] == tokenizer.end_of_document
    ends = (batch.targets == tokenizer.end_of_document) & inside
    assert torch.equal(starts[:, 1:] & inside[:, 1:], ends[:, :-1] & inside[:, 1:])
    assert (batch.targets[-1] == IGNORE).all() and (documents[-1] == -1).all()
    same = ~starts[:, 1:] & inside[:, 1:]
    assert torch.equal((positions[:, 1:] - positions[:, :-1])[same], torch.ones(int(same.sum()), dtype=torch.int64))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(permute(np.arange(97), 97, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # Neighbours are torn apart: a permutation that is nearly a shift would keep most of them.
    order = permute(np.arange(1000), 1000, 0, 0)
    assert (np.abs(np.diff(order)) <= 2).mean() < 0.02


def test_the_order_never_changes() -> None:
    """A run that is resumed under another version of this code must see the samples that it would have seen."""
    assert slots(np.arange(8, 20), 10, 7).tolist() == [5, 9, 6, 3, 8, 5, 0, 1, 7, 2, 9, 4]


@pytest.mark.parametrize(("data_size", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_ranks_share_one_order(folder: Path, data_size: int, micro_batch: int) -> None:
    data = TrainingData({str(folder / "out" / "train"): 1.0}, 16, seed=3)
    start, count = 2 * data.sources[0].full - 4, 8
    expected = data.batch(start, count, 0, 1, count)
    across = data_size * micro_batch
    parts = [data.batch(start, count, rank, data_size, micro_batch) for rank in range(data_size)]
    for name, whole in expected.side().items():
        ranks = [getattr(part, name).view(count // across, micro_batch, -1) for part in parts]
        assert torch.equal(torch.cat(ranks, dim=1).view_as(whole), whole), name
    keys, earlier = expected.side()["keys"], data.batch(0, 8, 0, 1, 8).side()["keys"]
    assert len(torch.cat([keys, earlier]).unique()) == 2 * count


def test_mistakes_are_one_sentence(folder: Path) -> None:
    train = str(folder / "out" / "train")
    with pytest.raises(ValueError, match="use global_batch=8"):
        share(0, 10, 0, 2, 4)
    with pytest.raises(ValueError, match=r"does not exist; make it with weft prepare"):
        Sequences(str(folder / "none"), 8)
    with pytest.raises(ValueError, match="one sequence takes 100000"):
        TrainingData({train: 1.0}, 100000, 0)
    config = PrepareConfig((str(folder / "text"),), TokenizerConfig(320))
    with pytest.raises(ValueError, match="was prepared with valid"):
        prepare(config, folder / "out")
    with pytest.raises(ValueError, match="has no file"):
        prepare(PrepareConfig((str(folder / "nowhere"),), TokenizerConfig(320)), folder / "new")
    assert not (folder / "new").exists()

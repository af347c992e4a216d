"""Packings: whole documents wherever they fit, every token once, and one order whatever the ranks."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.validate import parse
from models.loss import IGNORE
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.configs.test_validate import RUN, refusal
from tests.trainer import runs
from trainer import checkpoint
from trainer.config import RunConfig, Source
from trainer.data.indexed import write_index
from trainer.data.packing.base import PackingConfig
from trainer.data.packing.best_fit import best_fit_decreasing
from trainer.data.packing.whole import Whole
from trainer.data.rows import Rows
from trainer.data.sequences import Sequences
from trainer.data.stream import Stream
from trainer.data.training import TrainingData
from trainer.loop import Launch
from trainer.process import build_engine
from trainer.resume import load

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def stream(lengths: list[int]) -> Stream:
    """Documents whose tokens are their places."""
    sizes = np.array(lengths)
    return Stream("made", np.arange(sizes.sum()), sizes.cumsum() - sizes)


def contents(rows: Rows) -> list[list[list[int]]]:
    """Of every sequence, the targets of each of its documents."""
    found = []
    for index in range(len(rows)):
        _, targets, documents, _ = (x.numpy() for x in rows.row(index))
        found.append([targets[documents == number].tolist() for number in range(documents.max() + 1)])
    return found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 10**6), min_size=1, max_size=80))
def test_best_fit_is_that_of_the_plain_rule(capacity: int, drawn: list[int]) -> None:
    """Item by item: into the fullest bin that takes it. Bins of equal room may be taken in any order, so that their
    loads, but not their contents, are determined."""
    sizes = [1 + number % capacity for number in drawn]
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    bins = best_fit_decreasing(np.array(sizes), capacity)
    loads = np.bincount(bins, weights=sizes)
    assert sorted(loads.astype(int).tolist()) == sorted(capacity - room for room in rooms)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 45))
def test_no_document_is_cut_that_fits_and_every_token_is_there_once(lengths: list[int], length: int) -> None:
    data = stream(lengths)
    rows = Whole().pack(data, length)
    found = [piece for row in contents(rows) for piece in row]
    assert sorted(token for piece in found for token in piece) == list(range(len(data)))
    expected = []
    for start, size in zip(data.starts.tolist(), lengths, strict=True):
        # A longer one is cut at multiples of the length, and nowhere else.
        cuts = range(start, start + size, length)
        expected += [list(range(cut, min(cut + length, start + size))) for cut in cuts]
    assert sorted(found) == expected
    assert rows.full == len(rows)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 45))
def test_rows_are_what_the_engine_takes(lengths: list[int], length: int) -> None:
    """Each token is predicted from the one before it in the data; padding has no target, and is no document's."""
    data = stream(lengths)
    rows = Whole().pack(data, length)
    for index in range(len(rows)):
        tokens, targets, documents, positions = (x.numpy() for x in rows.row(index))
        real = targets != IGNORE
        assert real.tolist() == sorted(real, reverse=True) and real[0]
        assert (tokens[real] == (targets[real] - 1) % len(data)).all()
        assert (documents[~real] == -1).all() and not tokens[~real].any() and not positions[~real].any()
        for number in range(documents.max() + 1):
            assert positions[documents == number].tolist() == list(range((documents == number).sum()))
        assert (np.diff(documents[real]) >= 0).all() and (np.diff(targets[real]) > 0).all()
    past = rows.rows([len(rows)])
    assert (past.targets == IGNORE).all() and past.documents is not None and (past.documents == -1).all()


def test_the_plan_never_changes() -> None:
    """A run that is resumed under another version of this code must see the samples that it would have seen."""
    rows = Whole().pack(stream([3, 9, 2, 5, 1, 8, 4, 4]), 8)
    # By hand: 8, 8, 5, 4 + 4, then 3 to 5, 2 and 1 to new ones, in the order of the stream.
    ends = [[(piece[0], len(piece)) for piece in row] for row in contents(rows)]
    assert ends == [[(0, 3), (14, 5)], [(3, 8)], [(11, 1), (12, 2), (19, 1)], [(20, 8)], [(28, 4), (32, 4)]]
    assert str(rows) == "5 sequences, 10.00% padding, 1 of 8 documents cut"


def write(folder: Path, name: str, lengths: list[int], first: int = 0) -> str:
    """A dataset whose token at place i is first + i; returns its prefix."""
    folder.mkdir(exist_ok=True)
    np.arange(first, first + sum(lengths), dtype="<u2").tofile(folder / f"{name}.bin")
    write_index(folder / f"{name}.idx", np.dtype("<u2"), len(lengths), [np.array(lengths, dtype=np.int32)])
    return str(folder / name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Two datasets of 6 and 3 sequences of up to 8."""
    folder = tmp_path_factory.mktemp("packing")
    return {
        write(folder, "a", [8, 7, 6, 5, 9, 8, 2], 0): 2.0,
        write(folder, "b", [5, 5, 5], 1000): 1.0,
    }


def test_an_epoch_holds_every_token_once(weights: dict[str, float]) -> None:
    """Of each source of a blend, and the next epoch has another order."""
    data = TrainingData(weights, 8, 3, Whole())
    assert [source.full for source in data.sources] == [6, 3]
    targets = data.batch(0, 18, 0, 1, 18).targets
    for first, count, tokens in ((0, 6, 45), (1000, 3, 15)):
        own = [row[row != IGNORE].tolist() for row in targets if first <= int(row[0]) < first + 1000]
        epochs = [own[:count], own[count:]]
        for epoch in epochs:
            assert sorted(token - first for row in epoch for token in row) == list(range(tokens))
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("data_size", "micro_batch", "steps"), [(1, 1, 3), (2, 1, 1), (2, 2, 3), (3, 2, 1)])
def test_ranks_and_batches_share_one_order(
    weights: dict[str, float], data_size: int, micro_batch: int, steps: int
) -> None:
    """Each rank makes its plan itself."""
    data, start, total = TrainingData(weights, 8, 3, Whole()), 7, 12
    expected = data.batch(start, total, 0, 1, total)
    across, size = data_size * micro_batch, total // steps
    ranks = [TrainingData(weights, 8, 3, Whole()) for _ in range(data_size)]
    for name in ("tokens", "targets", "documents", "positions"):
        found = []
        for first in range(start, start + total, size):
            parts = [own.batch(first, size, rank, data_size, micro_batch) for rank, own in enumerate(ranks)]
            shaped = [getattr(part, name).view(size // across, micro_batch, -1) for part in parts]
            found.append(torch.cat(shaped, dim=1).flatten(0, 1))
        assert torch.equal(torch.cat(found), getattr(expected, name))


def test_the_plan_of_a_run_says_the_padding(weights: dict[str, float]) -> None:
    a, b = weights
    assert list(TrainingData(weights, 8, 0, Whole()).plan(9)) == [
        f"{a}: 6 of 9 samples (66.67%), 1.00 epochs of 6 sequences, 6.25% padding, 1 of 7 documents cut",
        f"{b}: 3 of 9 samples (33.33%), 1.00 epochs of 3 sequences, 37.50% padding, 0 of 3 documents cut",
    ]


def test_a_damaged_token_is_refused_with_its_place(tmp_path: Path) -> None:
    prefix = write(tmp_path, "data", [3, 5, 4])
    data = dataclasses.replace(Stream.open(prefix), vocab_size=7)
    with pytest.raises(ValueError, match=r"data.bin has token 8 at place 8, and the vocabulary ends at 6; it is damag"):
        # The documents of 3 and of 4, the second of which begins with token 8.
        Whole().pack(data, 7).row(0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("run"))


def packed(data: Path, folder: Path, mesh: MeshConfig | None = None, blend: bool = False, **train: object) -> RunConfig:
    """Documents of these data have about 100 tokens: some are cut, some are not."""
    config = runs.run_config(data, folder, mesh, **{"micro_batch": 1, "save_every": 0, **train})
    sources = (Source(str(data / "train"), 1.0), Source(str(data / "valid"), 2.0))
    changes = {"packing": Whole(), "sequence_length": 150, **({"train": sources} if blend else {})}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_a_row_has_the_loss_of_its_documents_alone(prepared: Path, tmp_path: Path) -> None:
    """Padding adds nothing, and no document sees another one."""
    config = packed(prepared, tmp_path, dtype="float64")
    engine = build_engine(config, Mesh.single())
    data = Stream.open(str(prepared / "train"))
    rows = Whole().pack(data, 150)
    assert engine.evaluate(rows.rows([len(rows)])) == (0.0, 0)
    checked = 0
    for index in range(len(rows)):
        batch = rows.rows([index])
        assert batch.documents is not None and batch.positions is not None
        if int(batch.documents.max()) == 0 or not (batch.documents < 0).any():
            continue
        loss, count = engine.evaluate(batch)
        alone = 0.0
        for number in range(int(batch.documents.max()) + 1):
            own = batch.documents[0] == number
            piece = dataclasses.replace(batch, **{name: x[:, own] for name, x in batch.side().items()})
            alone += engine.evaluate(piece)[0]
        assert count == int((batch.documents >= 0).sum())
        # The same sums of at most 150 terms in another order, in float64.
        assert loss == pytest.approx(alone, rel=150 * 2.0**-52)
        checked += 1
    assert checked


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(dp=2)], ids=str)
def test_resume_is_bitwise(prepared: Path, tmp_path: Path, pool: Pool, mesh: MeshConfig) -> None:
    """In a blend, stopped in the middle of an epoch and of a period."""
    whole, parts = (packed(prepared, tmp_path / name, mesh, blend=True, eval_every=2) for name in ("whole", "parts"))
    expected = pool.run(runs.run_through, mesh.world_size, whole)[0]
    assert pool.run(runs.run_interrupted, mesh.world_size, parts, 3)[0] == expected
    steps = [record for record in expected if "train/loss" in record]
    assert len(steps) == 6 and any(record["train/padding"] > 0 for record in steps)
    before = 0
    for record in steps:
        assert record["train/padding"] == pytest.approx(1 - (record["train/tokens"] - before) / (4 * 150))
        before = record["train/tokens"]


def test_two_ranks_train_as_one(prepared: Path, tmp_path: Path, pool: Pool) -> None:
    settings = {"dtype": "float64", "eval_every": 3}
    one = runs.run_through(packed(prepared, tmp_path / "one", **settings))
    two = pool.run(runs.run_through, 2, packed(prepared, tmp_path / "two", MeshConfig(dp=2), **settings))[0]
    assert [record.get("train/tokens") for record in one] == [record.get("train/tokens") for record in two]
    for left, right in zip(one, two, strict=True):
        # Sums of ranks in another order, through 6 updates of a model of 2 layers.
        assert left == pytest.approx(right, rel=1e-10)


def test_held_out_documents_are_packed_too(prepared: Path, tmp_path: Path) -> None:
    config = packed(prepared, tmp_path / "run", eval_every=6, eval_batches=100)
    _, printed = runs.run(config)
    engine = build_engine(config, Mesh.single())
    load(tmp_path / "run" / checkpoint.FOLDER / "step-00000006", engine)
    rows = Whole().pack(Stream.open(str(prepared / "valid")), 150)
    losses = [engine.evaluate(rows.rows([index])) for index in range(len(rows))]
    assert sum(count for _, count in losses) == len(rows.stream)
    expected = sum(loss for loss, _ in losses) / len(rows.stream)
    # float32: rows of one here and there, so that only the last sums differ.
    assert runs.records(config)[-1]["valid/loss"] == pytest.approx(expected, rel=1e-6)
    assert "% padding, " in printed


def forget_packing(path: Path) -> None:
    """Make a checkpoint what a Weft without the setting wrote."""
    state, manifest = (json.loads((path / name).read_text()) for name in (checkpoint.STATE, checkpoint.MANIFEST))
    del state["config"]["data"]["packing"]
    text = json.dumps(state).encode()
    (path / checkpoint.STATE).write_bytes(text)
    manifest["files"][checkpoint.STATE] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_change_is_warned_of_and_an_older_checkpoint_has_the_default(prepared: Path, tmp_path: Path) -> None:
    config = runs.run_config(prepared, tmp_path / "run")
    runs.run(config, Launch(stop_after=2))
    forget_packing(tmp_path / "run" / checkpoint.FOLDER / "step-00000002")
    assert "samples may repeat" not in runs.run(config, Launch(stop_after=3))[1]
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=Whole()))
    _, printed = runs.run(whole, Launch(stop_after=4))
    assert "data.packing.kind is 'whole', and was 'concatenate' until step 3; samples may repeat or be" in printed
    assert "samples may repeat" not in runs.run(whole, Launch(stop_after=5))[1]


def test_the_slot_is_read_as_others_are() -> None:
    assert parse(RunConfig, RUN).data.packing == PackingConfig.of_kind("concatenate")()
    whole = parse(RunConfig, {**RUN, "data": {**RUN["data"], "packing": {"kind": "whole"}}})
    assert whole.data.packing == Whole()
    assert isinstance(parse(RunConfig, RUN).data.packing.pack(stream([3]), 2), Sequences)
    assert refusal("data.packing={kind: hole}") == (
        "data.packing.kind: unknown packing kind 'hole'; did you mean 'whole'? the kinds are concatenate, whole"
    )
    assert refusal("data.packing=whole") == (
        "data.packing: 'whole' is not a mapping; write kind: and one of concatenate, whole"
    )

"""Blends: exact proportions at every sample, one order whatever the ranks, and what a run says and refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer.config import RunConfig, Source
from trainer.data.blend import LONGEST, Blend, fill, shares
from trainer.data.indexed import write_index
from trainer.data.training import TrainingData, source_seeds
from trainer.loop import Launch
from trainer.preflight import refuse_data

LENGTH = 4


def write(folder: Path, name: str, tokens: int, first: int = 0) -> str:
    """A dataset of one document whose token at place i is first + i; returns its prefix."""
    folder.mkdir(exist_ok=True)
    np.arange(first, first + tokens, dtype="<u2").tofile(folder / f"{name}.bin")
    write_index(folder / f"{name}.idx", np.dtype("<u2"), 1, [np.array([tokens], dtype=np.int32)])
    return str(folder / name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Three datasets of 5, 40 and 9 sequences; a sequence's tokens say where it comes from."""
    folder = tmp_path_factory.mktemp("blend")
    sizes = (("a", 5, 0, 0.5), ("b", 40, 1000, 0.3), ("c", 9, 2000, 0.2))
    return {write(folder, name, size * LENGTH, first): weight for name, size, first, weight in sizes}


def drawn(data: TrainingData, start: int, count: int) -> list[tuple[int, int]]:
    """The source and the row of each sample, from its first target."""
    first = data.batch(start, count, 0, 1, count).targets[:, 0]
    return [(int(token) // 1000, int(token) % 1000 // LENGTH) for token in first]


def test_shares_are_the_weights_in_whole_numbers() -> None:
    assert shares([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert shares([3, 3]) == (1, 1) and shares([1e-30]) == (1,) and shares([1e300, 3e300]) == (1, 3)
    # 0.30000000000000004 is rounded.
    assert shares([0.1 + 0.2, 0.7]) == (3, 7)
    # 12 digits of 1/3 and 2/3 take a longer period than there is; the larger remainder is rounded up.
    assert shares([0.333333333333, 0.666666666667]) == (333333, 666667) and LONGEST == 333333 + 666667
    with pytest.raises(ValueError, match=r"weight 1e-07 of 1 in all is too little for one of 1,000,000 samples; give"):
        shares([1.0, 1e-7])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_proportions_are_exact_at_every_sample(whole: list[int]) -> None:
    sources, turns = fill(whole)
    period = sum(whole)
    taken = np.arange(1, period + 1)
    for k, share in enumerate(whole):
        here = sources == k
        # Times the period, so that all of it is whole numbers.
        assert (np.abs(here.cumsum() * period - taken * share) < period).all()
        assert turns[here].tolist() == list(range(share))


def test_proportions_are_exact_over_many_periods() -> None:
    blend = Blend([0.55, 0.25, 0.2])
    count = 10 * sum(blend.shares) + 7
    sources, turns = blend.find(np.arange(count))
    for k, share in enumerate(blend.shares):
        here = sources == k
        error = here.cumsum() * sum(blend.shares) - np.arange(1, count + 1) * share
        assert (np.abs(error) < sum(blend.shares)).all()
        # No sample of a source is left out or taken twice where one period meets the next.
        assert turns[here].tolist() == list(range(here.sum()))
        assert [blend.counts(n)[k] for n in (0, 3, count)] == [0, here[:3].sum(), here.sum()]


def test_the_order_never_changes() -> None:
    """A run that is resumed under another version of this code must see the samples that it would have seen."""
    sources, turns = Blend([0.5, 0.3, 0.2]).find(np.arange(8, 20))
    # By hand, from slot 8 of the first period on.
    assert sources.tolist() == [0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert turns.tolist() == [4, 1, 5, 3, 6, 2, 7, 4, 8, 5, 9, 3]
    assert source_seeds(7, 3) == [7, 6238072747940578786, 6616413024727798925]


def test_each_source_goes_through_its_epochs(weights: dict[str, float]) -> None:
    data = TrainingData(weights, LENGTH, seed=3)
    samples = drawn(data, 0, 100)
    for k, (size, count) in enumerate([(5, 50), (40, 30), (9, 20)]):
        rows = [row for source, row in samples if source == k]
        assert len(rows) == count
        epochs = [rows[first : first + size] for first in range(0, count, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs if len(epoch) == size)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "an epoch has the order of another"
    assert samples != drawn(TrainingData(weights, LENGTH, seed=4), 0, 100)


def test_sources_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    two = {write(tmp_path, name, 30 * LENGTH, first): 1.0 for name, first in (("a", 0), ("b", 1000))}
    samples = drawn(TrainingData(two, LENGTH, seed=0), 0, 60)
    one, other = ([row for source, row in samples if source == k] for k in (0, 1))
    assert sorted(one) == sorted(other) == list(range(30)) and one != other


def test_a_blend_of_one_is_the_dataset_alone(weights: dict[str, float]) -> None:
    """In its order, too: a run may go from the one form to the other."""
    first = next(iter(weights))
    config = runs.run_config(Path("data"), Path("run"))
    alone = dataclasses.replace(config.data, train=first)
    listed = dataclasses.replace(config.data, train=(Source(first, 7.0),))
    expected = drawn(TrainingData(alone.weights, LENGTH, 3), 0, 12)
    assert drawn(TrainingData(listed.weights, LENGTH, 3), 0, 12) == expected
    # In a blend its samples keep that order.
    assert [sample for sample in drawn(TrainingData(weights, LENGTH, 3), 0, 24) if sample[0] == 0] == expected


@pytest.mark.parametrize(("data_size", "micro_batch", "steps"), [(1, 1, 3), (2, 1, 1), (2, 4, 3), (3, 2, 2), (4, 6, 1)])
def test_ranks_and_batches_share_one_order(
    weights: dict[str, float], data_size: int, micro_batch: int, steps: int
) -> None:
    data, start, total = TrainingData(weights, LENGTH, seed=3), 13, 24
    expected = data.batch(start, total, 0, 1, total)
    across, size = data_size * micro_batch, total // steps
    for name in ("tokens", "targets", "documents", "positions"):
        found = []
        for first in range(start, start + total, size):
            parts = [data.batch(first, size, rank, data_size, micro_batch) for rank in range(data_size)]
            ranks = [getattr(part, name).view(size // across, micro_batch, -1) for part in parts]
            found.append(torch.cat(ranks, dim=1).flatten(0, 1))
        assert torch.equal(torch.cat(found), getattr(expected, name))


def test_a_source_needs_a_sequence(weights: dict[str, float], tmp_path: Path) -> None:
    short = write(tmp_path, "short", LENGTH - 1)
    with pytest.raises(ValueError, match=rf"the data {short} has 3 tokens and one sequence takes 4"):
        TrainingData({**weights, short: 1.0}, LENGTH, 0)


def test_the_plan_says_how_often_each_source_is_repeated(weights: dict[str, float]) -> None:
    a, b, c = weights
    assert list(TrainingData(weights, LENGTH, 0).plan(50)) == [
        f"warning: {a}: 25 of 50 samples (50.00%), 5.00 epochs of 5 sequences; "
        "what is repeated more than 4 times teaches less and less",
        f"{b}: 15 of 50 samples (30.00%), 0.38 epochs of 40 sequences",
        f"{c}: 10 of 50 samples (20.00%), 1.11 epochs of 9 sequences",
    ]
    assert not any(line.startswith("warning") for line in TrainingData(weights, LENGTH, 0).plan(40))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("run"))


def blended(data: Path, folder: Path, mesh: MeshConfig | None = None, weight: float = 2.0) -> RunConfig:
    config = runs.run_config(data, folder, mesh, save_every=0, micro_batch=1)
    train = (Source(str(data / "train"), 1.0), Source(str(data / "valid"), weight))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(dp=2)], ids=str)
def test_resume_is_bitwise(prepared: Path, tmp_path: Path, pool: Pool, mesh: MeshConfig) -> None:
    """Stopped after step 3, in the middle of a period, a run goes on as one that never stopped."""
    whole, parts = (blended(prepared, tmp_path / name, mesh) for name in ("whole", "parts"))
    expected = pool.run(runs.run_through, mesh.world_size, whole)[0]
    assert pool.run(runs.run_interrupted, mesh.world_size, parts, 3)[0] == expected
    assert len(expected) == 6


def test_a_run_says_its_blend_and_warns_when_it_changes(prepared: Path, tmp_path: Path) -> None:
    config = blended(prepared, tmp_path / "run")
    _, printed = runs.run(config, Launch(stop_after=2))
    assert f"\n{prepared}/train: 8 of 24 samples (33.33%), " in printed
    assert f"{prepared}/valid: 16 of 24 samples (66.67%), " in printed
    assert "samples may repeat" not in runs.run(config, Launch(stop_after=3))[1]
    _, printed = runs.run(blended(prepared, tmp_path / "run", weight=3.0), Launch(stop_after=4))
    assert "data.train.1.weight is 3.0, and was 2.0 until step 3; samples may repeat or be left out" in printed
    one = runs.run_config(prepared, tmp_path / "run", micro_batch=1)
    assert "samples may repeat or be left out" in runs.run(one, Launch(stop_after=5))[1]


def test_every_source_is_refused_by_its_name(prepared: Path, tmp_path: Path) -> None:
    def said(*train: Source, valid: str | None = None) -> str:
        config = runs.run_config(prepared, tmp_path / "run")
        with pytest.raises(ValueError) as caught:
            refuse_data(dataclasses.replace(config, data=dataclasses.replace(config.data, train=train, valid=valid)))
        return str(caught.value)

    good = Source(str(prepared / "train"), 1.0)
    assert said(good, Source("nope/x", 1.0)).startswith("data.train.1.path: nope/x.bin does not exist; make it with")
    folder = said(good, Source(str(prepared), 1.0))
    assert folder == f"data.train.1.path: {prepared} is a folder; give the dataset in it, {prepared}/train"
    foreign = write(tmp_path / "foreign", "train", 30)
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 320, "sha256": "0"}}))
    mixed = f"{prepared}/train and {foreign} were made with different tokenizers; prepare them with one"
    assert said(good, Source(foreign, 1.0)) == mixed
    assert said(good, valid=foreign) == mixed
    # Without a manifest, the tokens are looked at: here at the end, and in the middle of a long dataset.
    wide = write(tmp_path, "wide", 10, first=runs.VOCAB - 5)
    assert said(good, Source(wide, 1.0)) == (
        f"model.vocab_size is {runs.VOCAB} and {wide} has the token 324; use at least 325, or other data"
    )
    long = write(tmp_path, "long", 60000)
    np.where(np.arange(60000) // 1000 == 30, 60000, 0).astype("<u2").tofile(f"{long}.bin")
    assert "has the token 60000; use at least 60001" in said(good, valid=long)
    np.zeros(60000, dtype="<u2").tofile(f"{long}.bin")
    config = runs.run_config(prepared, tmp_path / "run")
    refuse_data(dataclasses.replace(config, data=dataclasses.replace(config.data, train=(good, Source(long, 1.0)))))

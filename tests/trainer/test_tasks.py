"""Synthetic tasks: what their examples are, that a model learns one through the loop, and how answers are counted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load
from configs.validate import parse
from launch.cli import main
from models.loss import IGNORE
from tests.trainer import runs
from trainer.config import DataConfig, RunConfig
from trainer.data.tasks.automaton import Automaton, Sizes, canonical, minimal, random_automaton
from trainer.data.tasks.base import Example, TaskConfig, TaskRows
from trainer.data.tasks.copying import CopyingConfig
from trainer.data.tasks.induction import InductionConfig
from trainer.data.tasks.mqar import MQARConfig
from trainer.data.tasks.regular_languages import SEPARATOR, RegularLanguagesConfig, Strings
from trainer.data.tasks.samples import TaskSamples
from trainer.examination import examine

FOLDER = Path(__file__).resolve().parents[2] / "configs"
TASKS = {
    "mqar": MQARConfig(num_pairs=3, passes=2, power=1.0),
    "mqar-filled": MQARConfig(num_pairs=4, random_fill=True),
    "copying": CopyingConfig(letters=5),
    "induction": InductionConfig(),
    "regular_languages": RegularLanguagesConfig(string=9, most_strings=10),
}


def rows(task: TaskConfig, length: int = 32, vocab_size: int = 64, seed: int = 0, held_out: bool = False) -> TaskRows:
    return TaskRows(task, length, vocab_size, seed, held_out)


def test_every_kind_is_here() -> None:
    assert {name.split("-")[0] for name in TASKS} == set(TaskConfig.kinds())


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_functions_of_seed_and_index(name: str) -> None:
    task = TASKS[name]
    first = rows(task).row(5)
    assert all(torch.equal(a, b) for a, b in zip(first, rows(task).row(5), strict=True))
    tokens, targets, documents, positions = first
    assert tokens.shape == (32,) and 0 <= int(tokens.min()) and int(tokens.max()) < 64
    assert bool((targets != IGNORE).any()) and positions.tolist() == [*range(32)] and not documents.any()
    for other in (rows(task).row(6), rows(task, seed=1).row(5), rows(task, held_out=True).row(5)):
        assert not torch.equal(tokens, other[0])


def test_mqar_asks_for_what_it_showed() -> None:
    """Keys below half of the vocabulary, values above; the answer is the value last shown behind the key."""
    task = MQARConfig(num_pairs=3, passes=2, power=1.0)
    asked_at = np.zeros(32)
    for index in range(200):
        example = rows(task).example(index)
        tokens, targets = example.tokens_T.tolist(), example.targets_T.tolist()
        pairs = dict(zip(tokens[0:6:2], tokens[1:6:2], strict=True))
        assert len(pairs) == 3 and tokens[:6] == tokens[6:12]
        assert all(1 <= key < 32 <= value < 64 for key, value in pairs.items())
        asked = [place for place, target in enumerate(targets) if target != IGNORE]
        assert sorted(tokens[place] for place in asked) == sorted(pairs)
        assert all(place >= 12 and place % 2 == 0 and targets[place] == pairs[tokens[place]] for place in asked)
        assert not any(tokens[place] for place in range(12, 32) if place not in asked)
        asked_at[asked] += 1
        distances = {place: place - (6 + tokens[6:12].index(tokens[place])) for place in asked}
        for bound, low in ((4, 1), (16, 4), (64, 16)):
            inside = example.slices.get(f"distance<={bound}", np.zeros(32, dtype=bool))
            assert inside.nonzero()[0].tolist() == [place for place in asked if low < distances[place] <= bound]
    # power 1 asks anywhere: 600 questions over 10 slots, within 5 standard deviations of 60 each.
    assert np.all(np.abs(asked_at[12::2] - 60) < 5 * np.sqrt(600 * 0.1 * 0.9))


def test_copying_is_teacher_forced() -> None:
    example = rows(CopyingConfig(letters=5), length=10).example(0)
    tokens, targets = example.tokens_T.tolist(), example.targets_T.tolist()
    string = tokens[1:5]
    assert tokens == [0, *string, 1, *string] and targets == [IGNORE] * 5 + [*string, 2]
    assert all(3 <= letter < 8 for letter in string)


def test_induction_has_one_answer() -> None:
    for index in range(50):
        example = rows(InductionConfig(), length=7).example(index)
        tokens = example.tokens_T.tolist()
        places = [place for place, token in enumerate(tokens) if token == 63]
        assert len(places) == 2 and places[1] == 6
        assert example.targets_T.tolist() == [IGNORE] * 6 + [tokens[places[0] + 1]]


def test_automata_are_minimal_and_canonical() -> None:
    """Two states that no string tells apart are one, and the order in which states were made does not show."""
    redundant = [{0: 1, 1: 2}, {0: 0}, {0: 0}, {5: 0}]  # 1 and 2 are alike, 3 is not reached
    assert canonical(redundant, minimal(redundant)) == Automaton((((0, 1), (1, 1)), ((0, 0),)))
    random = np.random.default_rng(0)
    for _ in range(50):
        automaton = random_automaton(random, Sizes(12, 18, 3))
        table = [dict(edges) for edges in automaton.states]
        assert canonical(table, minimal(table)) == automaton
        order = random.permutation(len(table) - 1) + 1
        moved = [0, *order.tolist()]
        shuffled = [{}] * len(table)
        for state, row in enumerate(table):
            shuffled[moved[state]] = {symbol: moved[target] for symbol, target in row.items()}
        assert canonical(shuffled, minimal(shuffled)) == automaton


def test_regular_languages_say_what_is_legal() -> None:
    """Every answer is legal, every legal set is seen to be one, and no automaton is on both sides."""
    task = RegularLanguagesConfig(string=9, most_strings=10)
    for index in range(20):
        example = rows(task, length=64).example(index)
        assert isinstance(example, Strings)
        asked = example.targets_T != IGNORE
        assert example.legal_TV[asked, example.targets_T[asked]].all()
        assert not example.legal_TV[~asked].any() and not example.legal_TV[:, : SEPARATOR + 1].any()
        assert example.legal_TV[asked].sum(-1).max() <= 3
    random = np.random.default_rng(0)
    small = RegularLanguagesConfig(states=4, symbols=4)
    ours, theirs = ({small.automaton(random, held_out) for _ in range(300)} for held_out in (False, True))
    assert not ours & theirs and len(theirs) > 20


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_model_has_full_marks_and_a_blind_one_has_none(name: str) -> None:
    part = rows(TASKS[name], held_out=True)

    def perfect(index: int) -> torch.Tensor:
        example = part.example(index)
        if isinstance(example, Strings):
            return torch.from_numpy(example.legal_TV).double().log().clamp_min(-100)
        return 100.0 * torch.nn.functional.one_hot(torch.from_numpy(example.targets_T).clamp_min(0), 64)

    # `examine` asks in order.
    indices = iter(range(8))
    full = examine(lambda batch: torch.stack([perfect(next(indices)) for _ in batch.tokens]), part, 8, 3)
    none = examine(lambda batch: torch.zeros(*batch.tokens.shape, 64), part, 8, 3)
    # What takes token 0 for every answer is never right.
    assert full["accuracy"] == 1 and none["accuracy"] == 0
    if "exact" in full:
        assert (full["exact"], none["exact"]) == (1, 0)
    else:
        assert full["total_variation"] < 1e-12 and none["total_variation"] > 0.9


def test_ranks_and_epochs() -> None:
    samples = TaskSamples(dataclasses.replace(TASKS["mqar"], examples=12), 32, 64, seed=3)
    whole = samples.batch(0, 12, 0, 1, 12)
    parts = [samples.batch(0, 12, rank, 2, 3) for rank in range(2)]
    for name, all_ranks in whole.side().items():
        ranks = [part.side()[name].view(2, 3, -1) for part in parts]
        assert torch.equal(torch.cat(ranks, dim=1).view_as(all_ranks), all_ranks), name
    again = samples.batch(12, 12, 0, 1, 12)
    assert {tuple(row) for row in whole.tokens.tolist()} == {tuple(row) for row in again.tokens.tolist()}
    assert not torch.equal(whole.tokens, again.tokens)
    assert list(samples.plan(24)) == ["mqar: 2.00 epochs of 12 examples"]
    assert list(TaskSamples(TASKS["copying"], 32, 64, 0).plan(24)) == ["copying: 24 examples, each new"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("task_*.yaml")), ids=lambda path: path.stem)
def test_task_configs_train(path: Path, tmp_path: Path) -> None:
    steps = ["train.steps=2", "train.global_batch=2", "train.micro_batch=2", "train.eval_every=2", "schedule.warmup=1"]
    config: RunConfig = parse(RunConfig, load(str(path), [*steps, f"run.dir={tmp_path / 'run'}"]))
    runs.run(config)
    assert any("valid/loss" in record for record in runs.records(config))


def test_a_run_on_a_task_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps through the loop, and what `weft eval --task` prints; the full run is in the docs."""
    folder = str(tmp_path / "run")
    steps = [
        "schedule.warmup=1",
        "train.steps=4",
        "train.global_batch=8",
        "train.micro_batch=8",
        "train.eval_every=4",
        f"run.dir={folder}",
    ]
    config: RunConfig = parse(RunConfig, load(str(FOLDER / "task_mqar.yaml"), steps))
    _, printed = runs.run(config)
    assert "mqar: 32 examples, each new" in printed and "held-out loss" in printed
    assert main(["eval", folder, "--task", "mqar", "num_pairs=2", "--limit", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["task"]["num_pairs"], report["length"], report["examples"]) == (2, 32, 5)
    assert 0 <= report["figures"]["accuracy"] <= 1
    assert main(["eval", folder, "--task", "copying", "--window", "16", "--limit", "5"]) == 0
    assert "over 5 held-out examples of copying, 16 tokens each" in capsys.readouterr().out


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one step."""
    folder = str(tmp_path_factory.mktemp("task") / "run")
    steps = ["train.steps=1", "train.eval_every=0", "train.global_batch=2", "train.micro_batch=2", f"run.dir={folder}"]
    runs.run(parse(RunConfig, load(str(FOLDER / "task_mqar.yaml"), ["schedule.warmup=0", *steps])))
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "mqr"], "did you mean 'mqar'"),
        (["--task", "mqar", "num_pairs=40"], "takes an even --window of at least 160, not 32"),
        (["--task", "mqar", "pairs=4"], "task.pairs: unknown key"),
        (["--task", "mqar", "--stride", "4"], "both --task and --stride are given"),
    ],
)
def test_refusals_of_examination(
    words: list[str], sentence: str, learned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", learned, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_refusals() -> None:
    for task, length, vocab_size, sentence in (
        (MQARConfig(num_pairs=4), 14, 64, "takes an even sequence_length of at least 16, not 14"),
        (MQARConfig(num_pairs=4), 32, 32, "takes a vocab_size of at least 33, not 32"),
        (CopyingConfig(), 5, 64, "takes an even sequence_length of at least 4, not 5"),
        (CopyingConfig(letters=62), 8, 64, "takes a vocab_size of at least 65, not 64"),
        (InductionConfig(), 2, 64, "at least 3, not 2"),
        (RegularLanguagesConfig(), 32, 19, "takes a vocab_size of at least 20, not 19"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rows(task, length, vocab_size)
    with pytest.raises(ValueError, match="edges is 4"):
        RegularLanguagesConfig(edges=4)
    with pytest.raises(ValueError, match="both task and valid are given"):
        DataConfig(32, task=MQARConfig(), valid="data/valid")
    with pytest.raises(ValueError, match="or give a task"):
        DataConfig(32)


def test_an_example_is_right_when_all_of_its_answers_are() -> None:
    example = Example(np.array([1, 2, 3]), np.array([IGNORE, 5, 6]))
    logits = torch.nn.functional.one_hot(torch.tensor([0, 5, 7]), 8).double()
    assert MQARConfig().measure(logits, example) == {"accuracy": (1.0, 2.0), "exact": (0.0, 1.0)}

"""data.train as a list of sources: what it becomes, and one sentence for what it cannot be."""

import pytest

from configs.structure import instantiate, to_plain
from configs.validate import parse
from tests.configs.test_validate import RUN, refusal
from trainer.config import RunConfig, Source

EITHER = "is not text or a list, each a mapping with path, weight or null; the default of train is null"


def test_a_blend_goes_there_and_back() -> None:
    train = [{"path": "a", "weight": 1}, {"path": "b", "weight": 0.5}]
    config = parse(RunConfig, {**RUN, "data": {**RUN["data"], "train": train}})
    assert config.data.train == (Source("a", 1.0), Source("b", 0.5)) == config.data.sources
    plain = to_plain(config)
    assert plain["data"]["train"] == [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 0.5}]
    assert parse(RunConfig, plain) == config == instantiate(RunConfig, plain)
    assert parse(RunConfig, RUN).data.sources == (Source("data/train", 1.0),)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.train=3", f"data.train: 3 {EITHER}"),
        ("data.train={path: a}", f"data.train: {{'path': 'a'}} {EITHER}"),
        ("data.train=[a]", "data.train.0: 'a' is not a mapping; write a mapping with path, weight"),
        ("data.train=[{path: a}]", "data.train.0: weight is missing; data.train.0 needs it, a number"),
        ("data.train=[{path: a, weight: 1, w: 2}]", "data.train.0.w: unknown key; data.train.0 takes path, weight"),
        ("data.train=[{path: a, weight: '1'}]", "data.train.0.weight: '1' is not a number; write 1.0 without quotes"),
        (
            "data.train=[]",
            "data: train is missing or an empty list; name a dataset, list path and weight of several, or give a task",
        ),
        (
            "data.train=[{path: a, weight: 1}, {path: b, weight: 0}]",
            "data.train.1: weight is 0.0; it must be above 0; leave a source out that is not wanted",
        ),
        (
            "data.train=[{path: a, weight: -2}]",
            "data.train.0: weight is -2.0; it must be above 0; leave a source out that is not wanted",
        ),
        (
            "data.train=[{path: a, weight: 1}, {path: b, weight: 1e-7}]",
            "data: weight 1e-07 of 1 in all is too little for one of 1,000,000 samples; "
            "give it more, or leave its source out",
        ),
        (
            "data.train=[{path: a, weight: 1}, {path: a, weight: 2}]",
            "data: train has a 2 times; list it once, with the sum of its weights",
        ),
        (
            "data.train=[{path: a.idx, weight: 1}]",
            "data.train.0: path is 'a.idx'; leave the ending out, 'a' names both files",
        ),
    ],
)
def test_one_sentence(change: str, sentence: str) -> None:
    assert refusal(change) == sentence

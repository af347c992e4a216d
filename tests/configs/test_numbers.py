"""Whatever number stands in a config: it is refused in one sentence when the config is read, or the model can be built.

The numbers' places are found by walking the schemas, so that a new plug-in's are tried too.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import merge
from configs.structure import is_slot, without_none
from configs.text import dump_yaml
from trainer.config import RunConfig
from trainer.preflight import load_run

Data = dict[str, Any]
Keys = tuple[str, ...]

BASE: Data = {
    "model": {
        "vocab_size": 32,
        "d_model": 16,
        "layers": {"A": {"mixer": {"kind": "attention", "num_heads": 4}, "ffn": {"kind": "swiglu", "hidden": 8}}},
        "pattern": "AA",
    },
    "run": {"dir": "runs/x"},
    "data": {"train": "d/train", "sequence_length": 8},
    "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
    "optim": {"kind": "adamw", "lr": 1.0},
}
NOTHING: Data = {}
# What every kind of memory goes with.
UNDONE: Data = {"model": {"residual": {"kind": "reversible"}}}
# What goes when a slot is filled that stands in its place.
WITHOUT: dict[Keys, Data] = {("data", "task"): {"data": {"train": None}}}
# At the edges of 32 and 64 bits, where a product with another size passes them, and what rules tend to forget.
WHOLE = (-1, 0, 2**31, 2**62)
REAL = (-1.0, 0.0, 1e-300, 3e38, math.nan)


@dataclasses.dataclass(frozen=True)
class Number:
    """A place for one. kind: of the plug-in that it belongs to, and choice: what gives a config that plug-in.
    several: it is one of a list."""

    keys: Keys
    whole: bool
    kind: str = ""
    choice: Data = dataclasses.field(default_factory=dict)
    several: bool = False

    def __str__(self) -> str:
        return ".".join(filter(None, [*self.keys[:-1], self.kind, self.keys[-1]]))

    def holding(self, value: float) -> Data:
        return nested(self.keys, [value, value] if self.several else value)


def nested(keys: Keys, value: Any) -> Data:
    for key in reversed(keys):
        value = {key: value}
    return value


def numbers(annotation: Any, keys: Keys = (), kind: str = "", choice: Data = NOTHING) -> Iterator[Number]:
    """Every place for a number in a config of this type, with every kind in every slot, but for slots in themselves."""
    bare = without_none(annotation)
    if is_slot(bare) and bare.slot in keys[:-1]:
        return
    if is_slot(bare):
        for name, cls in bare.kinds().items():
            instead = WITHOUT.get(keys, NOTHING)
            yield from numbers(
                cls, keys, name, merge({**choice, **instead}, nested(keys, {"kind": name, **cls.example}))
            )
    elif dataclasses.is_dataclass(bare):
        hints = typing.get_type_hints(bare)
        for field in dataclasses.fields(bare):
            yield from numbers(hints[field.name], (*keys, field.name), kind, choice)
    elif typing.get_origin(bare) is dict:
        yield from numbers(typing.get_args(bare)[1], (*keys, "A"), kind, choice)
    elif bare == int | str:
        yield Number(keys, True, kind, choice)
    elif bare in (int, float):
        yield Number(keys, bare is int, kind, choice)
    elif typing.get_origin(bare) is tuple and typing.get_args(bare)[0] in (int, float):
        yield Number(keys, typing.get_args(bare)[0] is int, kind, choice, several=True)


# A mixture of attention heads refuses this router, whatever its numbers.
REFUSED = "model.layers.A.mixer.router.expert_choice."
NUMBERS = tuple(number for number in numbers(RunConfig) if not str(number).startswith(REFUSED))


def first_of(choice: Data) -> Number:
    """Of the numbers that one kind has."""
    return next(number for number in NUMBERS if number.choice == choice)


def refusal(folder: Path, data: Data) -> str | None:
    """What is said of a config, or None where it can be built (which `load_run` does, on the meta device)."""
    file = folder / "config.yaml"
    file.write_text(dump_yaml(data))
    try:
        load_run(str(file))
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


def test_the_walk_finds_the_numbers() -> None:
    found = {str(number) for number in NUMBERS}
    assert {"model.repeat", "model.layers.A.mixer.attention.rope_theta", "optim.adamw.betas", "mesh.pp"} <= found
    assert {"model.residual.ladder.layers", "model.layers.A.norm.pre.eps", "model.depth.skip_middle.key_floor"} <= found


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_one_number(folder: Path, number: Number) -> None:
    """A refusal is one sentence and leads to the number: by name, or as the size of what it would make."""
    chosen = merge(merge(BASE, UNDONE if number.keys[0] == "memory" else NOTHING), number.choice)
    if number is first_of(number.choice):
        assert refusal(folder, chosen) is None
    for value in WHOLE if number.whole else REAL:
        said = refusal(folder, merge(chosen, number.holding(value)))
        assert said is None or ("\n" not in said and (number.keys[-1] in said or "elements" in said)), (value, said)
        assert said is not None or not math.isnan(value)


@st.composite
def configs(draw: st.DrawFn) -> Data:
    """Any kinds that have numbers, with two or three of the numbers replaced."""
    chosen = draw(st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=3))
    data = BASE
    for number in chosen:
        data = merge(data, number.choice)
    # Of two kinds in one slot the later one is there.
    for number in [number for number in chosen if merge(data, number.choice) == data]:
        edges = st.sampled_from(WHOLE if number.whole else REAL)
        anything = st.integers(1, 9) | st.integers(2**20, 2**63 - 1) if number.whole else st.floats(min_value=0)
        data = merge(data, number.holding(draw(edges | anything)))
    return data


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=configs())
def test_several_numbers(folder: Path, data: Data) -> None:
    said = refusal(folder, data)
    assert said is None or "\n" not in said


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("model.vocab_size", 2**24),
        ("model.d_model", 2**18),
        ("model.repeat", 100),
        ("model.layers.A.mixer.window", 2**62),
        ("model.layers.A.mixer.rope_theta", 1e9),
        ("model.layers.A.mixer.rope_fraction", 0.5),
        ("model.layers.A.ffn.hidden", 2**22),
        ("model.norm", {"kind": "peri", "eps": 1e-30}),
        ("model.values", {"kind": "resformer", "lambda1": -1e4, "lambda2": 0}),
        ("data.sequence_length", 2**27),
        ("run.seed", 2**63 - 1),
        ("train", {"steps": 10**9, "global_batch": 2**16, "save_every": 2**62, "keep_checkpoints": 2**62}),
        ("optim", {"lr": 0, "betas": [0, 0.999999], "eps": 1e-15, "weight_decay": 0, "clip": 1e30}),
        ("schedule", {"kind": "cosine", "warmup": 2**40}),
        ("mesh", {"tp": 2, "cp": 2, "pp": 2, "schedule": "gpipe"}),
        ("train.global_batch", 4096),
    ],
)
def test_what_works_is_not_refused(folder: Path, keys: str, value: Any) -> None:
    assert refusal(folder, merge(BASE, nested(tuple(keys.split(".")), value))) is None

"""Types of fields that no shipped config has yet: tuples, tables, optional slots and unions."""

import dataclasses
from typing import Any, Literal

import pytest

from configs.errors import ConfigError
from configs.structure import to_plain
from configs.validate import parse
from models.norms.base import NormConfig


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Types that no shipped config has yet."""

    names: tuple[str, ...] = ()
    norms: tuple[NormConfig, ...] = ()
    pairs: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    either: int | Literal["all"] = 1
    norm: NormConfig | None = None
    one_or_more: NormConfig | tuple[NormConfig, ...] | str | None = None


def test_other_types() -> None:
    data = {
        "names": ["a", "b"],
        "norms": [{"kind": "pre"}, {"kind": "post", "eps": 1}],
        "pairs": [[1, 2]],
        "table": {"a": 1},
        "either": "all",
        "norm": None,
    }
    got = parse(Shapes, data)
    assert got.names == ("a", "b")
    assert [norm.kind for norm in got.norms] == ["pre", "post"] and got.norms[1].eps == 1.0
    assert got.table == {"a": 1} and got.either == "all" and got.norm is None
    for given in (
        None,
        "none",
        {"kind": "pre", "eps": 1.0},
        [{"kind": "pre", "eps": 1.0}, {"kind": "post", "eps": 1.0}],
    ):
        assert to_plain(parse(Shapes, {"one_or_more": given}))["one_or_more"] == given


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"names": "ab"}, "s.names: 'ab' is not a list; write a list, each text"),
        ({"names": ["a", 1]}, 's.names.1: 1 is not text; write it in quotes, "1"'),
        ({"norms": [{"kind": "pre"}, {}]}, "s.norms.1: kind is missing; write kind: and one of none, peri, post, pre"),
        ({"pairs": [[1]]}, "s.pairs.0: [1] has 1 elements; write a list of 2: a whole number, a number"),
        ({"table": {"a": "x"}}, "s.table.a: 'x' is not a whole number; the default of table is {}"),
        ({"one_or_more": {"kind": "pre", "n": 1}}, "s.one_or_more.n: unknown key; pre takes eps"),
        ({"one_or_more": [{}]}, "s.one_or_more.0: kind is missing; write kind: and one of none, peri, post, pre"),
        ({"either": "none"}, "s.either: 'none' is not a whole number or all; the default of either is 1"),
    ],
)
def test_other_types_refused(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Shapes, data, "s")
    assert str(caught.value) == sentence

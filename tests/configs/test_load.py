"""Files, bases and overrides become plain data."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load, merge, override
from configs.text import dump_yaml, parse_yaml


def write(folder: Path, **files: str) -> Path:
    """Write `<name>.yaml` for each, and return the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2E+4", -2e4),
        ("1.5", 1.5),
        (".5", 0.5),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("010", 10),
        ("0", 0),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1e", "1e"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'8'", "8"),
        ("[1, 2.0]", [1, 2.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars(text: str, value: object) -> None:
    got = parse_yaml(f"key: {text}", "f")["key"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-3", "010", "no", "true", "null", "", "1:30", "~", "a: b", " x", 1e-8, 1e22, 3, None, True]
)
def test_what_is_written_is_read_back(value: object) -> None:
    data = {"key": value, "list": [value, [value]], "map": {"a": value}}
    assert parse_yaml(dump_yaml(data), "f") == data


def test_aliases_and_merge_keys() -> None:
    assert parse_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2}", "f") == {"a": {"p": 1}, "b": {"p": 1, "q": 2}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "x.yaml:4: the key 'c' stands in lines 3 and 4 of one mapping; keep one"),
        ("a: [1", "x.yaml:1: expected ',' or ']', but got '<stream end>'; check quotes, brackets and indentation"),
        ("a: b: c", "x.yaml:1: mapping values are not allowed here; check quotes, brackets and indentation"),
        ("? [1]\n: 2", "x.yaml:1: a key is not a word; write it as text"),
        (
            "a: !!python/name:os.system x",
            "x.yaml:1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
    ],
)
def test_bad_yaml(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value) == sentence


def test_control_characters_are_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml: this is not YAML \(.*#x0000"):
        parse_yaml("a: \x00", "x.yaml")


def test_merge_is_deep_and_pure() -> None:
    below, above = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}, {"a": {"c": {"f": 4}}, "e": None}
    assert merge(below, above) == {"a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": None}
    assert below == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_another_kind_replaces_the_whole_mapping() -> None:
    below = {"mixer": {"kind": "attention", "num_heads": 4}}
    assert merge(below, {"mixer": {"kind": "gla", "size": 1}}) == {"mixer": {"kind": "gla", "size": 1}}
    assert merge(below, {"mixer": {"kind": "attention", "window": 2}})["mixer"]["num_heads"] == 4
    assert merge(below, {"mixer": {"window": 2}})["mixer"] == {"kind": "attention", "num_heads": 4, "window": 2}


def test_bases_lie_below_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, root="a: 1\nb: 1\nc: 1")
    write(tmp_path / "sub", one="base: ../root.yaml\nb: 2", two="c: 3")
    top = write(tmp_path, top="base: [sub/one.yaml, sub/two.yaml]\nd: 4")
    assert load(top) == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_two_ways_to_one_base_are_no_cycle(tmp_path: Path) -> None:
    top = write(tmp_path, top="base: [l.yaml, r.yaml]", l="base: root.yaml", r="base: root.yaml", root="a: 1")
    assert load(top) == {"a": 1}


def test_empty_file(tmp_path: Path) -> None:
    assert load(write(tmp_path, top="# nothing")) == {}


def test_cycle(tmp_path: Path) -> None:
    top = write(tmp_path, a="base: b.yaml", b="base: a.yaml")
    with pytest.raises(ConfigError) as caught:
        load(top)
    assert str(caught.value) == (
        f"{top}: base leads back to the file itself (a.yaml -> b.yaml -> a.yaml); take one base out"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- 1", "{}: holds [1], not a mapping; write key: value lines"),
        ("base: 3", "{}: base is 3; it takes a file, or a list of files"),
        ("base: [a.yaml, 3]", "{}: base is ['a.yaml', 3]; it takes a file, or a list of files"),
        ("a:\n  - {1: 2}", "{}: the key 1 is not text; write it in quotes"),
        ("true: 2", "{}: the key true is not text; write it in quotes"),
        ("a: &x [*x]", "{}: is nested more than 50 deep; take out the alias that names what it stands in"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, sentence: str) -> None:
    top = write(tmp_path, top=text)
    with pytest.raises(ConfigError) as caught:
        load(top)
    assert str(caught.value) == sentence.format(top)


def test_missing_files(tmp_path: Path) -> None:
    top = write(tmp_path, top="base: bsae.yaml", base="a: 1")
    with pytest.raises(ConfigError) as caught:
        load(top)
    assert str(caught.value) == (
        f"{tmp_path / 'bsae.yaml'}, which top.yaml names as its base, does not exist; did you mean base.yaml?"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "nothing" / "like.this")
    assert str(caught.value) == f"{tmp_path / 'nothing' / 'like.this'} does not exist; give the path of a YAML file"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory; give a YAML file"


def test_overrides_in_order(tmp_path: Path) -> None:
    top = write(tmp_path, top="a: {b: 1, kind: x}\nc: [1]")
    got = load(top, ["a.b=2", "a.b=1e-3", "c=[4, 5]", "new.key='8'", "a.deep.er=", "d={e: 1}"])
    assert got == {
        "a": {"b": 1e-3, "kind": "x", "deep": {"er": None}},
        "c": [4, 5],
        "new": {"key": "8"},
        "d": {"e": 1},
    }
    assert load(top, ["a.kind=y"])["a"] == {"kind": "y"}


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    file = write(tmp_path, x="data:\n  train:\n  - {path: a, weight: 1}\n  - {path: b, weight: 3}\n  pair: [1, 2]")
    changed = load(file, ["data.train.0.weight=2", "data.train.1={path: c}", "data.pair.1=5", "data.train.0.path=z"])
    assert changed == {"data": {"train": [{"path": "z", "weight": 2}, {"path": "c", "weight": 3}], "pair": [1, 5]}}
    before = {"a": [{"b": [1, 2]}]}
    assert override("a.0.b.1=3", before) == {"a": [{"b": [1, 3]}]} and before == {"a": [{"b": [1, 2]}]}
    assert load(file, ["data.train=[1]"])["data"]["train"] == [1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train.steps", "'train.steps' is no override; write a dotted key and a value, such as train.steps=100"),
        ("a..b=1", "'a..b=1' is no override; write a dotted key and a value, such as train.steps=100"),
        ("=1", "'=1' is no override; write a dotted key and a value, such as train.steps=100"),
        ("a.b.c=1", "a.b.c: a.b is 5, which has no keys; write a.b=... instead"),
        (
            "c.2.d=1",
            "c.2.d: c has 2 elements, whose numbers are 0 to 1, and 2 is not one; write c=[...] for another list",
        ),
        ("c.d=1", "c.d: c has 2 elements, whose numbers are 0 to 1, and d is not one; write c=[...] for another list"),
        (
            "c.-1=1",
            "c.-1: c has 2 elements, whose numbers are 0 to 1, and -1 is not one; write c=[...] for another list",
        ),
        ("c.1.d=1", "c.1.d: c.1 is 2, which has no keys; write c.1=... instead"),
        ("e.0=1", "e.0: e has 0 elements, whose numbers are none, and 0 is not one; write e=[...] for another list"),
        (
            "x=[1",
            "the value of x:1: expected ',' or ']', but got '<stream end>'; check quotes, brackets and indentation",
        ),
        ("x={1: 2}", "the value of x: the key 1 is not text; write it in quotes"),
    ],
)
def test_bad_overrides(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(text, {"a": {"b": 5}, "c": [{"d": 1}, 2], "e": []})
    assert str(caught.value) == sentence

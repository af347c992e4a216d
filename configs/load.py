"""A config file as plain data: its base files below it, dotted overrides on top.

    base: base_debug.yaml       a file, or a list of which later ones win; relative to the file that names it

A mapping is merged with the one below it, key by key. Where both say `kind` and differ, the upper one replaces the
lower one whole, since the lower one's other keys belong to another kind. null as an entry of a mapping of entries,
such as a layer's letter, takes that entry out (`configs.validate`, which knows the types, does it). A list replaces
the one below it whole; an override may name one of its elements, by its number.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, did_you_mean, shown
from configs.text import parse_yaml

Data = dict[str, Any]
DEEPEST = 50


def load(file: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Data:
    """Read `file` with its bases, then apply overrides such as "train.steps=100", in order.

    Raises ConfigError for what cannot be read; what the keys mean is checked by `configs.validate`.
    """
    data = read(Path(file), ())
    for text in overrides:
        data = merge(data, override(text, data))
    return data


def read(file: Path, above: tuple[Path, ...]) -> Data:
    """One file and its bases. above: the files that led here, outermost first."""
    here = file.resolve()
    if here in above:
        chain = " -> ".join(path.name for path in (*above[above.index(here) :], here))
        raise ConfigError(f"{file}: base leads back to the file itself ({chain}); take one base out")
    data = parse_yaml(text_of(file, above), str(file))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds {shown(data)}, not a mapping; write key: value lines")
    refuse_odd_keys(data, str(file))
    bases = data.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{file}: base is {shown(bases)}; it takes a file, or a list of files")
    below: Data = {}
    for base in bases:
        below = merge(below, read(file.parent / base, (*above, here)))
    return merge(below, data)


def text_of(file: Path, above: tuple[Path, ...]) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [path.name for path in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        named = f", which {above[-1].name} names as its base," if above else ""
        hint = did_you_mean(file.name, near) or "give the path of a YAML file; "
        raise ConfigError(f"{file}{named} does not exist; {hint.strip().rstrip(';')}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{file}: cannot be read: {reason}; give a YAML file") from error


def refuse_odd_keys(data: Any, path: str, depth: int = 0) -> None:
    """Keys are text, which YAML's 1 and true are not, and an alias does not stand inside of what it names."""
    if depth > DEEPEST:
        raise ConfigError(
            f"{path}: is nested more than {DEEPEST} deep; take out the alias that names what it stands in"
        )
    for value in data if isinstance(data, list) else ():
        refuse_odd_keys(value, path, depth + 1)
    for key, value in data.items() if isinstance(data, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {shown(key)} is not text; write it in quotes")
        refuse_odd_keys(value, path, depth + 1)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Data:
    """A new mapping in which `above` wins; nothing given is modified."""
    if "kind" in below and "kind" in above and below["kind"] != above["kind"]:
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def override(text: str, data: Mapping[str, Any]) -> Data:
    """From "a.b=1" to {"a": {"b": 1}}, to be merged into `data`; the value is YAML.

    A list has its elements' numbers as keys, from 0. Refused where `data` has neither a list nor a mapping on the way.
    Whether the last key exists is for the schema to say: a key that is absent may have a default.
    """
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"{text!r} is no override; write a dotted key and a value, such as train.steps=100")
    parsed = parse_yaml(value, f"the value of {path}")
    refuse_odd_keys(parsed, f"the value of {path}")
    return placed(keys, 0, parsed, data)


def placed(keys: list[str], depth: int, value: Any, here: Any) -> Any:
    """`value` at keys[depth:], to be merged into `here`. A list is given whole, with one element changed."""
    if depth == len(keys):
        return value
    path, whole, key = ".".join(keys), ".".join(keys[:depth]), keys[depth]
    if isinstance(here, list):
        if key not in map(str, range(len(here))):
            numbers = f"0 to {len(here) - 1}" if here else "none"
            raise ConfigError(
                f"{path}: {whole} has {len(here)} elements, whose numbers are {numbers}, and {key} is not one; "
                f"write {whole}=[...] for another list"
            )
        old = here[int(key)]
        new = placed(keys, depth + 1, value, old)
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        return [*here[: int(key)], merge(old, new) if both else new, *here[int(key) + 1 :]]
    if here is not None and not isinstance(here, Mapping):
        raise ConfigError(f"{path}: {whole} is {shown(here)}, which has no keys; write {whole}=... instead")
    return {key: placed(keys, depth + 1, value, here.get(key) if here else None)}

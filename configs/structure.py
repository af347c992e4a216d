"""From nested plain data to frozen config dataclasses and back. Standard library only: exported models carry this file.

A slot is any class with `of_kind`; its data is a mapping whose `kind` picks the dataclass.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def is_slot(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "of_kind") and not hasattr(annotation, "kind")


def slots_in(annotation: Any, around: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Every slot that a config of this type can hold, in the order of its fields; those inside its kinds follow it.

    around: slots that it stands in, whose kinds may hold one of their own and are not gone through again.
    """
    if is_slot(annotation):
        if annotation not in around:
            yield annotation
            for cls in annotation.kinds().values():
                yield from slots_in(cls, (*around, annotation))
    elif dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        for field in dataclasses.fields(annotation):
            yield from slots_in(hints[field.name], around)
    for argument in typing.get_args(annotation):
        yield from slots_in(argument, around)


def is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def without_none(annotation: Any) -> Any:
    """`X | None` becomes X; anything else stays."""
    if is_union(annotation):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def structured(annotation: Any) -> bool:
    """Whether a slot or a dataclass stands in it: the rest, leaf types, is pydantic's."""
    if is_slot(annotation) or dataclasses.is_dataclass(annotation):
        return True
    return any(structured(arg) for arg in typing.get_args(annotation))


def member(annotation: Any, data: Any) -> Any:
    """The type of a union that a list or a mapping is meant for; any other type or data gives `annotation` back."""
    for one in typing.get_args(annotation) if is_union(annotation) else ():
        is_list = typing.get_origin(one) in (list, tuple)
        is_mapping = typing.get_origin(one) is dict or dataclasses.is_dataclass(one) or is_slot(one)
        if (is_list and isinstance(data, list | tuple)) or (is_mapping and isinstance(data, dict)):
            return one
    return annotation


def instantiate(annotation: Any, data: Any) -> Any:
    """Build `annotation` (a dataclass, slot, dict or tuple of them, leaf type or union) from data known to be valid."""
    annotation = member(without_none(annotation), data)
    if data is None or dataclasses.is_dataclass(data):
        return data
    if is_slot(annotation):
        cls = annotation.of_kind(data["kind"])
        return instantiate(cls, {key: value for key, value in data.items() if key != "kind"})
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return annotation(**{key: instantiate(hints[key], value) for key, value in data.items()})  # type: ignore[operator]
    if typing.get_origin(annotation) is dict:
        return {key: instantiate(typing.get_args(annotation)[1], value) for key, value in data.items()}
    if typing.get_origin(annotation) is tuple:
        return tuple(instantiate(typing.get_args(annotation)[0], value) for value in data)
    return data


def to_plain(value: Any) -> Any:
    """The inverse of `instantiate`: mappings, lists and scalars, with every default written out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": value.kind, **plain} if hasattr(value, "kind") else plain  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value

"""Plain data against the types of dataclass fields, and the frozen dataclasses when it fits.

A slot (see `configs.structure.is_slot`) is data with a `kind` that picks the dataclass; leaves are pydantic's, in
strict mode: "8" is not 8 and 1 is not true, but a whole number may stand for a float. Whole numbers have 63 bits
and a sign, as in torch, and other numbers are those that float32 holds: what it rounds to infinity or to 0 would pass a
rule here and break it in a model.
"""

import dataclasses
import math
import typing
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from configs.errors import ConfigError, at, did_you_mean, shown
from configs.structure import instantiate, is_slot, is_union, member, structured, without_none

WORDS = MappingProxyType(
    {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
)
# float32's largest number, and its smallest with all digits: processors may take smaller ones for 0.
LARGEST, SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126


def parse(annotation: Any, data: Any, path: str = "") -> Any:
    """The instance that `data` describes. Raises ConfigError where `validate` does."""
    return instantiate(annotation, validate(annotation, data, path))


def validate(annotation: Any, data: Any, path: str = "") -> Any:
    """`data` with whole numbers made floats where the type says so; instances of dataclasses are left alone.

    annotation: a dataclass, a slot, a dict, list or tuple of them, a leaf type, or a union, of which a list or a
    mapping takes the first member of its shape.
    path: where `data` stands, dotted. Raises ConfigError, one sentence, for the first thing that is wrong.
    """
    if data is None and allows_none(annotation):
        return None
    annotation, given = member(without_none(annotation), data), annotation
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return data
    if is_slot(annotation):
        return validate_slot(annotation, data, path)
    if dataclasses.is_dataclass(annotation):
        return validate_fields(annotation, mapping(annotation, data, path), path)
    if typing.get_origin(annotation) is dict:
        return validate_entries(annotation, mapping(annotation, data, path), path)
    if typing.get_origin(annotation) in (list, tuple):
        return validate_items(annotation, data, path)
    return validate_leaf(given, data, path)


def validate_entries(annotation: Any, data: dict[str, Any], path: str) -> dict[str, Any]:
    """A mapping of entries by name; null takes out the entry that a base file gives."""
    item = typing.get_args(annotation)[1]
    kept = {key: value for key, value in data.items() if value is not None or allows_none(item)}
    checked = {}
    for key, value in kept.items():
        try:
            checked[key] = validate(item, value, join(path, key))
        except ConfigError as error:
            if (others := [other for other in kept if other != key]) and incomplete(item, value):
                raise ConfigError(f"{error}; if another was meant, {path} has {', '.join(others)}") from error
            raise
    return checked


def incomplete(annotation: Any, data: Any) -> bool:
    """Whether a mapping lacks something that its dataclass needs, as one does that an override makes by mistake."""
    if not dataclasses.is_dataclass(annotation) or not isinstance(data, dict):
        return False
    return any(required(field) and field.name not in data for field in dataclasses.fields(annotation))


def validate_slot(slot: Any, data: Any, path: str) -> dict[str, Any]:
    data = mapping(slot, data, path)
    if "kind" not in data:
        raise at(path, f"kind is missing; write kind: and one of {', '.join(slot.kinds())}")
    kind = data["kind"]
    if not isinstance(kind, str):
        raise at(join(path, "kind"), f"{shown(kind)} is not text; the kinds are {', '.join(slot.kinds())}")
    try:
        cls = slot.of_kind(kind)
    except ValueError as error:
        raise at(join(path, "kind"), str(error)) from error
    rest = {key: value for key, value in data.items() if key != "kind"}
    return {"kind": kind, **validate_fields(cls, rest, path)}


def validate_fields(cls: Any, data: dict[str, Any], path: str) -> dict[str, Any]:
    """Each field by its type, then what the dataclass itself refuses."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    name = getattr(cls, "kind", None) if hasattr(cls, "of_kind") else path
    for key in data:
        if key not in fields:
            takes = f"{name or 'the config'} takes {', '.join(fields) or 'no keys'}"
            raise at(join(path, key), f"unknown key; {did_you_mean(key, fields)}{takes}")
    for key, field in fields.items():
        if key not in data and required(field):
            raise at(path, f"{key} is missing; {name or 'the config'} needs it, {describe(hints[key])}")
    checked = {}
    for key, value in data.items():
        try:
            checked[key] = validate(hints[key], value, join(path, key))
        except LeafError as error:
            raise ConfigError(f"{error}{instead(cls, fields[key])}") from error
    try:
        instantiate(cls, checked)
    except ValueError as error:
        raise at(path, str(error)) from error
    return checked


def validate_items(annotation: Any, data: Any, path: str) -> list[Any]:
    args = typing.get_args(annotation)
    if not isinstance(data, list | tuple):
        raise at(path, f"{shown(data)} is not a list; write {describe(annotation)}")
    if typing.get_origin(annotation) is list or args[1:] == (...,):
        items: tuple[Any, ...] = (args[0],) * len(data)
    elif len(data) == len(args):
        items = args
    else:
        raise at(path, f"{shown(list(data))} has {len(data)} elements; write {describe(annotation)}")
    return [validate(item, value, join(path, str(i))) for i, (item, value) in enumerate(zip(items, data, strict=True))]


class LeafError(ConfigError):
    """A value of the wrong type or size, with nothing near it to propose."""


def validate_leaf(annotation: Any, data: Any, path: str) -> Any:
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        raise LeafError(at(path, f"{shown(data)} is out of range; write a whole number below 2**63 in magnitude"))
    try:
        value = adapter(annotation).validate_python(data)
        if isinstance(value, float) and not abs(value) <= LARGEST:
            raise LeafError(
                at(
                    path,
                    f"{shown(value)} is {'too large' if math.isfinite(value) else 'not finite'}; write a number "
                    f"below {LARGEST:.1e} in magnitude, the largest of float32",
                )
            )
        if isinstance(value, float) and 0 < abs(value) < SMALLEST:
            raise LeafError(at(path, f"{shown(value)} is 0 in float32; write 0, or a number above {SMALLEST:.1e}"))
        return value
    except ValidationError as error:
        text = f"{shown(data)} is not {describe(annotation)}"
        if choices := literals(without_none(annotation)):
            text = f"{shown(data)} is no choice; {did_you_mean(data, choices)}the choices are {describe(annotation)}"
            raise at(path, text) from error
        if near := repair(without_none(annotation), data):
            raise at(path, text + near) from error
        raise LeafError(at(path, text)) from error


def instead(cls: Any, field: dataclasses.Field[Any]) -> str:
    """What else the field may hold."""
    if not required(field):
        value = default_of(field)
        return f"; the default of {field.name} is {shown(list(value) if isinstance(value, tuple) else value)}"
    example = getattr(cls, "example", {})
    return f", such as {shown(example[field.name])}" if field.name in example else ""


@cache
def adapter(annotation: Any) -> TypeAdapter[Any]:
    """Of a union, that of its leaf types."""
    if is_union(annotation):
        annotation = typing.Union[tuple(arg for arg in typing.get_args(annotation) if not structured(arg))]  # noqa: UP007
    return TypeAdapter(annotation, config={"strict": True, "arbitrary_types_allowed": False})


def repair(annotation: Any, data: Any) -> str:
    """The nearest value of the right type, where there is one."""
    if annotation is str and isinstance(data, int | float):
        return f'; write it in quotes, "{shown(data)}"'
    if isinstance(data, bool | list | dict | None):
        return ""
    try:
        near = TypeAdapter(annotation).validate_python(data.strip() if isinstance(data, str) else data)
    except (ValidationError, PydanticUserError):
        return ""
    if isinstance(near, float) and not math.isfinite(near):
        return ""
    return f"; write {shown(near)}" + (" without quotes" if isinstance(data, str) else "")


def mapping(annotation: Any, data: Any, path: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise at(path, f"{shown(data)} is not a mapping; write {describe(annotation)}")
    for key in data:
        if not isinstance(key, str):
            raise at(path, f"the key {shown(key)} is not text; write it in quotes")
    return data


def required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def allows_none(annotation: Any) -> bool:
    return annotation in (None, type(None), Any) or (is_union(annotation) and type(None) in typing.get_args(annotation))


def literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def describe(annotation: Any) -> str:
    """The type in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if is_union(annotation):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple and args[1:] != (...,):
        return f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"
    if origin in (list, tuple):
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return f"key: value pairs, each value {describe(args[1])}"
    if is_slot(annotation):
        return f"kind: and one of {', '.join(annotation.kinds())}"
    if dataclasses.is_dataclass(annotation):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(annotation))}"
    return WORDS.get(annotation) or getattr(annotation, "__name__", str(annotation))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key

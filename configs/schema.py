"""The JSON schema (draft 2020-12) of a config type, for editors that complete and check YAML.

It describes a whole config, with its bases and overrides merged in, or one file of it. Combinations that a dataclass
refuses in `__post_init__` are beyond it; `configs.validate` has the last word.
"""

import dataclasses
import inspect
import re
import typing
from typing import Any

from pydantic import TypeAdapter

from configs.structure import is_slot, structured, to_plain, without_none
from configs.validate import allows_none, default_of, required

Schema = dict[str, Any]


def schema(annotation: Any, title: str) -> Schema:
    """Of a dataclass; every dataclass inside stands once under $defs, plug-ins as slot.kind."""
    definitions: dict[str, Schema] = {}
    root = reference(annotation, definitions)
    definitions = {name: definitions[name] for name in sorted(definitions)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **root, "$defs": definitions}


def of_files(whole: Schema) -> Schema:
    """The schema of a file that may have a base: nothing is required, since the base may have it, and entries of a
    mapping may be null."""

    def relaxed(value: Any) -> Any:
        if isinstance(value, dict):
            is_object = value.get("type") == "object"
            kept = {key: relaxed(item) for key, item in value.items() if not (is_object and key == "required")}
            entry = kept.get("additionalProperties")
            # null takes out an entry that the base has.
            return {**kept, "additionalProperties": {"anyOf": [entry, {"type": "null"}]}} if entry else kept
        return [relaxed(item) for item in value] if isinstance(value, list) else value

    out = relaxed(whole)
    root = out["$defs"][out["$ref"].rpartition("/")[2]]
    text = {"type": "string"}
    base = {"anyOf": [text, {"type": "array", "items": text}], "description": "files below this one; later ones win"}
    root["properties"] = {"base": base, **root["properties"]}
    return out


def reference(annotation: Any, definitions: dict[str, Schema]) -> Schema:
    """The schema of a field's type; what it refers to is added to `definitions`."""
    bare = without_none(annotation)
    if is_slot(bare):
        out: Schema = {"description": field_words(bare)[""]}
        out["anyOf"] = [reference(cls, definitions) for cls in bare.kinds().values()]
    elif dataclasses.is_dataclass(bare):
        name = f"{bare.slot}.{bare.kind}" if hasattr(bare, "slot") else bare.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = fields_of(bare, definitions)
        out = {"$ref": f"#/$defs/{name}"}
    elif typing.get_origin(bare) is dict:
        out = {"type": "object", "additionalProperties": reference(typing.get_args(bare)[1], definitions)}
    elif typing.get_origin(bare) in (list, tuple) and structured(bare):
        out = {"type": "array", "items": reference(typing.get_args(bare)[0], definitions)}
    elif structured(bare):
        members = [arg for arg in typing.get_args(bare) if arg is not type(None)]
        out = {"anyOf": [reference(arg, definitions) for arg in members]}
    else:
        return TypeAdapter(annotation).json_schema()
    return {**out, "anyOf": [*out.get("anyOf", [out]), {"type": "null"}]} if allows_none(annotation) else out


def fields_of(cls: Any, definitions: dict[str, Schema]) -> Schema:
    """The schema of one dataclass, with `kind` as a constant where it is a plug-in."""
    hints, words = typing.get_type_hints(cls), field_words(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    properties: dict[str, Schema] = {}
    needed = [field.name for field in fields if required(field)]
    if hasattr(cls, "of_kind"):
        properties["kind"] = {"const": cls.kind}
        needed.insert(0, "kind")
    for field in fields:
        entry = reference(hints[field.name], definitions)
        if field.name in words:
            entry = {**entry, "description": words[field.name]}
        if not required(field):
            entry = {**entry, "default": to_plain(default_of(field))}
        properties[field.name] = entry
    out: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if needed:
        out["required"] = needed
    return {"description": words[""], **out} if words[""] else out


def field_words(cls: Any) -> dict[str, str]:
    """What the docstring says of each field, as in "hidden: width of ...", and under "" what comes before them.

    What it does not say of an inherited field, the docstrings of the dataclasses above it say.
    """
    inherited = [field_words(base) for base in cls.__mro__[:0:-1] if dataclasses.is_dataclass(base)]
    return {name: text for words in [*inherited, own_words(cls)] for name, text in words.items()}


def own_words(cls: Any) -> dict[str, str]:
    """The same from the docstring of `cls` alone."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if text.startswith(f"{cls.__name__}("):
        return {"": ""}  # what dataclasses write where there is no docstring
    names = "|".join(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ""
    if not names:
        return {"": " ".join(text.split())}
    # A name in the middle of a sentence, as in "a string of letters: ...", begins no field.
    parts = re.split(rf"(?:(?<=[.;)]\s)|(?<=\n)|^)((?:{names})(?:, (?:{names}))*): ", text)
    words = {"": " ".join(parts[0].split())}
    for heads, body in zip(parts[1::2], parts[2::2], strict=True):
        words |= {name: " ".join(body.split()) for name in heads.split(", ")}
    return words

"""Slots and their kinds: a config class names its kind once, and is found by scanning the slot's folder.

A slot is a base class made with `slot=` and `folder=`; a kind is a frozen dataclass that subclasses it with `kind=`.
Folders named by the environment variable WEFT_PLUGINS (os.pathsep between them) are scanned too:
`<folder>/mixers/mine.py` is imported as `models.mixers.mine`, so that an idea can live outside this repository.
"""

import dataclasses
import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast


class Plugin:
    """Base of all slot configs."""

    slot: ClassVar[str]
    folder: ClassVar[str]
    kind: ClassVar[str]
    example: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # fields of a small instance, for tests and docs
    registry: ClassVar[dict[str, type["Plugin"]]]

    def __init_subclass__(
        cls, slot: str | None = None, folder: str | None = None, kind: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if slot is not None:
            assert folder is not None
            cls.slot, cls.folder, cls.registry = slot, folder, {}
        if kind is not None:
            known = cls.registry.get(kind)
            if known is not None and known.__module__ != cls.__module__:
                raise ValueError(f"{cls.slot} kind {kind!r} of {cls.__module__} is already taken by {known.__module__}")
            cls.kind = kind
            cls.registry[kind] = cls

    def canonical(self, d_model: int) -> Self:
        """The same computation and parameters in a model of this width, in one spelling: defaults that depend on other
        settings are written out, and what only training uses, such as the weight of a loss, has its default."""
        return self

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """Import every file of the slot's folder and return its kinds by name.

        An exported model's copy of this file has no folders to scan: what it carries has registered already.
        """
        if __package__ != "models":
            return cast(dict[str, type[Self]], dict(sorted(cls.registry.items())))
        package = importlib.import_module(cls.folder)
        for root in filter(None, os.environ.get("WEFT_PLUGINS", "").split(os.pathsep)):
            extra = os.path.join(root, cls.folder.rpartition(".")[2])
            if os.path.isdir(extra) and extra not in package.__path__:
                package.__path__.append(extra)
                importlib.invalidate_caches()
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{cls.folder}.{info.name}")
        return cast(dict[str, type[Self]], dict(sorted(cls.registry.items())))

    @classmethod
    def such_as(cls, fits: Callable[[type[Self]], bool]) -> str:
        """ ", such as a, b or c": the kinds that fit, for the way out that a refusal names; "" when none does."""
        fitting = [kind for kind, config in cls.kinds().items() if fits(config)]
        if not fitting:
            return ""
        return ", such as " + " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))

    @classmethod
    def of_kind(cls, kind: str) -> type[Self]:
        """The config class of `kind`; ValueError, with the nearest spelling, when there is none."""
        if kind in cls.registry:
            return cast(type[Self], cls.registry[kind])
        kinds = cls.kinds()
        if kind not in kinds:
            near = difflib.get_close_matches(str(kind), kinds, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            own = "" if near or os.environ.get("WEFT_PLUGINS") else ", and WEFT_PLUGINS names no folder with more"
            raise ValueError(f"unknown {cls.slot} kind {kind!r}; {hint}the kinds are {', '.join(kinds)}{own}")
        return kinds[kind]


def plugins_in(value: Any) -> Iterator[Plugin]:
    """Every plug-in config inside a config, the nested ones too, as often as each occurs."""
    if isinstance(value, Plugin):
        yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        yield from plugins_in(item)


def promises(value: Any, *names: str) -> bool:
    """Whether every plug-in inside a config, nested ones too, has all of these properties or does not deny them."""
    return all(getattr(plugin, name, True) for plugin in plugins_in(value) for name in names)

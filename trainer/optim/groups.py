"""Parameter groups: which parameters another learning rate or weight decay holds for, by role or by name."""

import dataclasses
import difflib
import fnmatch
import typing
from collections.abc import Iterable

import torch

from models.config import LMConfig
from models.limits import at_least
from models.lm import LM
from models.params import ParamSpec, Role, named_specs

ROLES: tuple[str, ...] = typing.get_args(Role)


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters that an optimiser treats apart.

    match: a role (embedding, head, router, gate, matrix, vector), or a pattern of names such as "layers.0.*". lr_scale:
    factor on the learning rate; 0 freezes. weight_decay: in place of the optimiser's, also of parameters that declare
    not to decay; null for what holds without the group.
    """

    match: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "lr_scale")
        if self.weight_decay is not None:
            at_least(self, 0, "weight_decay")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What holds for one parameter."""

    spec: ParamSpec
    lr_scale: float
    weight_decay: float
    eps_scale: float


def matches(pattern: str, name: str, spec: ParamSpec) -> bool:
    """Whether a role or a pattern of names means this parameter."""
    return spec.role == pattern if pattern in ROLES else fnmatch.fnmatchcase(name, pattern)


def whole_specs(model: LMConfig) -> dict[str, ParamSpec]:
    """The declaration of every parameter of the model by name, whatever a rank holds of it."""
    with torch.device("meta"):
        return {name: spec for name, _, _, spec in named_specs(LM(model))}


def settings(model: LMConfig, groups: tuple[GroupConfig, ...], weight_decay: float) -> dict[str, Setting]:
    """What holds for every parameter, by name: the first group that matches, over the optimiser's own, in
    the proportion that the model's scaling asks for."""
    found = {}
    for name, spec in whole_specs(model).items():
        group = next((group for group in groups if matches(group.match, name, spec)), GroupConfig(""))
        own = weight_decay if spec.decay else 0.0
        decay = own if group.weight_decay is None else group.weight_decay
        size = spec.factors
        found[name] = Setting(spec, group.lr_scale * size.lr, decay * size.weight_decay, size.eps)
    return found


def refuse_patterns(model: LMConfig, patterns: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for the first (key, pattern) that means no parameter of the model."""
    specs = whole_specs(model)
    for key, pattern in patterns:
        if not any(matches(pattern, name, spec) for name, spec in specs.items()):
            roles = sorted({spec.role for spec in specs.values()})
            near = difflib.get_close_matches(pattern, [*roles, *specs], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"{key} is {pattern!r}, which no parameter of the model is called; {hint}"
                f"its roles are {', '.join(roles)}, and a name is like {next(iter(specs))}, with * for any part of it"
            )

"""The lesson layer by layer: every layer of a student learns by itself to go where a plain teacher's layer goes.

Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.layer import Extras, Layer
from models.lm import LM
from models.loss import IGNORE
from models.memory.full import FullConfig
from models.noise import of_layer
from models.params import upcast
from models.residual.following import Following
from models.slots import Cache
from models.state import Side, State
from parallel.distillation import Lesson, Teacher


class Step(NamedTuple):
    """What a layer of the teacher is given and makes. x: its input, p_l. previous: that of the layer before it, p_{l-1}
    or what is taken for it. target: p_{l+1}. others: the entries beside x that it is given."""

    x_BTD: Tensor
    previous_BTD: Tensor
    target_BTD: Tensor
    others: State


class LayerByLayer(Lesson):
    """Layer l of the student is given the state that stands for the teacher's p_{l-1} and p_l (`Following`) and learns
    to make p_{l+1} of it: the loss is the squared error by token, as a share of |p_{l+1} - p_{l-1}|^2, in the mean over
    layers. No gradient passes between layers.

    A two-step rule has to add p_{l+1} - p_{l-1} = f_l(p_l) + f_{l-1}(p_{l-1}), given p_l alone. p_{l-1} is the fixed
    point of p <- p_l - f_{l-1}(p), and known here, where the teacher runs. iterations: take this many from p = p_l
    instead; 1 is the estimate of arXiv 2512.02056, p_l - f_{l-1}(p_l), which makes what is to be added a function of
    p_l.
    """

    def __init__(self, iterations: int | None = None) -> None:
        self.iterations = iterations

    @contextlib.contextmanager
    def prepared(self, student: LM) -> Iterator[None]:
        """Layers that do not hand their output on cannot be undone, and keep their inputs meanwhile."""
        before = student.run_layers, [layer.keeper for layer in student.blocks]
        FullConfig().apply(student)
        try:
            yield
        finally:
            student.run_layers = before[0]
            for layer, keeper in zip(student.blocks, before[1], strict=True):
                layer.keeper = keeper

    @contextlib.contextmanager
    def taught(self, teacher: Teacher, student: LM, side: dict[str, Tensor]) -> Iterator[None]:
        steps, residual, head = self.walk(teacher, side), student.config.residual, student.head
        assert isinstance(residual, Following) and head is not None
        errors_BT: list[Tensor] = []

        def follow(
            layers: list[Layer], entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
        ) -> tuple[State, list[Extras]]:
            made = []
            for layer, step in zip(layers, steps, strict=True):
                state = {**step.others, **residual.standing(step.x_BTD, step.previous_BTD)}
                entries, extras = layer(state, of_layer(side, layer.index), of_layer(local, layer.index))
                errors_BT.append(share(entries["x"] - step.target_BTD, step.target_BTD - step.previous_BTD))
                made.append(extras)
            return entries, made

        def error(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
            return torch.stack(errors_BT).mean(0)[targets_BT != IGNORE].sum()

        before = student.run_layers, head.cross_entropy
        student.run_layers, head.cross_entropy = follow, error
        try:
            yield
        finally:
            student.run_layers, head.cross_entropy = before

    def walk(self, teacher: Teacher, side: dict[str, Tensor]) -> list[Step]:
        """Of each layer, in order (a collective)."""
        steps: list[Step] = []

        def walk(
            layers: list[Layer], entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
        ) -> tuple[State, list[Extras]]:
            made = []
            previous_BTD = entries["x"]
            for layer in layers:
                sides = of_layer(side, layer.index), of_layer(local, layer.index)
                x_BTD, others = entries["x"], {name: entry for name, entry in entries.items() if name != "x"}
                entries, extras = layer(entries, *sides)
                steps.append(Step(x_BTD, previous_BTD, entries["x"], others))
                previous_BTD = x_BTD
                if self.iterations is not None:
                    previous_BTD = entries["x"]
                    for _ in range(self.iterations):
                        added_BTD = layer({**others, "x": previous_BTD}, *sides)[0]["x"] - previous_BTD
                        previous_BTD = entries["x"] - added_BTD
                made.append(extras)
            return entries, made

        model = teacher.models[0]
        own, model.run_layers = model.run_layers, walk
        try:
            teacher.ask(side, keep_BK=side["tokens"][:, :0])
        finally:
            model.run_layers = own
        return steps


def share(error_BTD: Tensor, whole_BTD: Tensor) -> Tensor:
    """[B, T]: |error|^2 / |whole|^2, in float32 at least."""
    error_BT, whole_BT = (upcast(x_BTD).square().sum(-1) for x_BTD in (error_BTD, whole_BTD))
    return error_BT / whole_BT.clamp_min(torch.finfo(whole_BT.dtype).tiny)

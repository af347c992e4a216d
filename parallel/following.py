"""The lesson layer by layer: every layer of a student learns by itself to go where a plain teacher's layer goes.

Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

# What a layer or a sublayer is called with; the state is first.
Given = tuple[Any, ...]


class Taught(NamedTuple):
    """What a layer of the teacher is given and makes. x: its input. previous: that of the step before it, or what is
    taken for it. targets: where its steps come, in order. others: the entries beside x that it is given."""

    x_BTD: Tensor
    previous_BTD: Tensor
    targets: tuple[Tensor, ...]
    others: State


class LayerByLayer(Lesson):
    """Each layer of the student is given the state that stands for the teacher's p_{i-1} and p_i (`Following`), the
    inputs of successive steps, and learns to make p_{i+1} of it, and p_{i+2} if it is two steps: the loss is the
    squared error by token, as a share of |p_{i+1} - p_{i-1}|^2, in the mean over steps and layers. No gradient passes
    between layers.

    A two-step rule has to add p_{i+1} - p_{i-1} = f_i(p_i) + f_{i-1}(p_{i-1}), given p_i alone. p_{i-1} is the fixed
    point of p <- p_i - f_{i-1}(p), and known here, where the teacher runs. iterations: take this many from p = p_i
    instead; 1 is the estimate of arXiv 2512.02056, p_i - f_{i-1}(p_i), which makes what is to be added a function of
    p_i.
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
        residual, head = student.config.residual, student.head
        assert isinstance(residual, Following) and head is not None
        lessons = self.walk(teacher, side, halves=len(residual.steps) == 2)
        errors_BT: list[Tensor] = []

        def follow(
            layers: list[Layer], entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
        ) -> tuple[State, list[Extras]]:
            made = []
            for layer, taught in zip(layers, lessons, strict=True):
                state = {**taught.others, **residual.standing(taught.x_BTD, taught.previous_BTD)}
                entries, extras = layer(state, of_layer(side, layer.index), of_layer(local, layer.index))
                aims = residual.aims(taught.targets, last=layer is layers[-1])
                came = (taught.previous_BTD, taught.x_BTD, *taught.targets)
                for reached_BTD, aim_BTD, left_BTD in zip(residual.reached(entries), aims, came, strict=False):
                    errors_BT.append(share(reached_BTD - aim_BTD, aim_BTD - left_BTD))
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

    def walk(self, teacher: Teacher, side: dict[str, Tensor], halves: bool) -> list[Taught]:
        """Of each layer, in order (a collective). halves: mixers and FFNs are steps of their own."""
        lessons: list[Taught] = []
        take = self.two_steps if halves else self.one_step

        def walk(
            layers: list[Layer], entries: State, side: Side, local: Side, cache: dict[str, Cache] | None
        ) -> tuple[State, list[Extras]]:
            made = []
            previous_BTD = entries["x"]
            for layer in layers:
                given = entries, of_layer(side, layer.index), of_layer(local, layer.index)
                x_BTD, others = entries["x"], {name: entry for name, entry in entries.items() if name != "x"}
                (entries, extras), targets, last_BTD = take(layer, given)
                lessons.append(Taught(x_BTD, previous_BTD, targets, others))
                previous_BTD = last_BTD
                made.append(extras)
            return entries, made

        model = teacher.models[0]
        own, model.run_layers = model.run_layers, walk
        try:
            teacher.ask(side, keep_BK=side["tokens"][:, :0])
        finally:
            model.run_layers = own
        return lessons

    def one_step(self, layer: Layer, given: Given) -> tuple[tuple[State, Extras], tuple[Tensor, ...], Tensor]:
        """What a layer of the teacher returns, where its steps come, and the input of the last one."""
        out = layer(*given)
        x_BTD = out[0]["x"]
        return out, (x_BTD,), self.earlier(layer, given, x_BTD)

    def two_steps(self, layer: Layer, given: Given) -> tuple[tuple[State, Extras], tuple[Tensor, ...], Tensor]:
        """The same where the mixer is a step, and the FFN the last one."""
        found: list[tuple[Tensor, Tensor]] = []

        def hook(ffn: nn.Module, given: Given, out: tuple[State, Any]) -> None:
            found.append((given[0]["x"], self.earlier(ffn.forward, given, out[0]["x"])))

        with layer.ffn.register_forward_hook(hook):
            out = layer(*given)
        ((middle_BTD, last_BTD),) = found
        return out, (middle_BTD, out[0]["x"]), last_BTD

    def earlier(self, step: Callable[..., tuple[State, Any]], given: Given, x_BTD: Tensor) -> Tensor:
        """The input of a plain step that made x_BTD of what it was given, or what is taken for it."""
        state, *rest = given
        if self.iterations is None:
            return state["x"]
        p_BTD = x_BTD
        for _ in range(self.iterations):
            p_BTD = x_BTD - (step({**state, "x": p_BTD}, *rest)[0]["x"] - p_BTD)
        return p_BTD


def share(error_BTD: Tensor, whole_BTD: Tensor) -> Tensor:
    """[B, T]: |error|^2 / |whole|^2, in float32 at least; |error|^2 where the whole is nothing, as of a token that a
    layer leaves alone."""
    error_BT, whole_BT = (upcast(x_BTD).square().sum(-1) for x_BTD in (error_BTD, whole_BTD))
    return error_BT / whole_BT.where(whole_BT > 0, 1)

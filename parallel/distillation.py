"""Engines of distillation: one that predicts, and one that learns from it on the same ranks, by a lesson.

Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.kernels.linear_divergence import linear_divergence
from models.lm import LM, Output
from parallel import data
from parallel.engine import Engine
from parallel.mesh import MeshConfig


def refuse_split(mesh: MeshConfig) -> None:
    """Raise ValueError for a mesh whose ranks do not each hold whole sequences and the whole vocabulary."""
    for degree in ("tp", "cp", "ep", "pp"):
        if getattr(mesh, degree) > 1:
            raise ValueError(
                f"the mesh {mesh} has {degree}={getattr(mesh, degree)}, and a model is converted on data ranks alone; "
                f"leave {degree} out, or use dp, fsdp or hsdp instead"
            )


class Teacher(Engine):
    """Is asked, and does not learn."""

    @torch.no_grad()
    def ask(self, side: dict[str, Tensor], keep_BK: Tensor | None = None) -> Tensor:
        """[B, T, V] of a micro-batch of this data rank (a collective), or of the tokens `keep_BK` alone. Nothing is
        drawn."""
        refuse_split(self.mesh.config)
        with self._computing():
            out: Output = self.models[0](
                side["tokens"],
                documents_BT=side.get("documents"),
                positions_BT=side.get("positions"),
                keep_BK=keep_BK,
            )
        data.reshard(self.models[0])
        assert out.logits is not None
        return out.logits


class Lesson(abc.ABC):
    """What a student's loss in training is."""

    @abc.abstractmethod
    def taught(
        self, teacher: Teacher, student: LM, side: dict[str, Tensor]
    ) -> contextlib.AbstractContextManager[object]:
        """The student's forward pass over a micro-batch within it has the lesson's loss for its cross-entropy: a sum
        over this rank's tokens with a target."""

    @contextlib.contextmanager
    def prepared(self, student: LM) -> Iterator[None]:
        """Around all steps of it."""
        yield


class Predictions(Lesson):
    """The divergence from the teacher's predictions: sum of KL(teacher || student), from float32 log-probabilities."""

    @contextlib.contextmanager
    def taught(self, teacher: Teacher, student: LM, side: dict[str, Tensor]) -> Iterator[None]:
        teacher_NV = teacher.ask(side).flatten(0, 1)

        def divergence(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
            return linear_divergence(h_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), teacher_NV)

        head = student.head
        assert head is not None
        own, head.cross_entropy = head.cross_entropy, divergence
        try:
            yield
        finally:
            head.cross_entropy = own


class Student(Engine):
    """Its loss in training is the lesson's, by default `Predictions`; in evaluation it is the cross-entropy."""

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.lesson: Lesson = Predictions()

    @contextlib.contextmanager
    def taking(self, lesson: Lesson) -> Iterator[None]:
        """The lesson in place of the one before."""
        before, self.lesson = self.lesson, lesson
        try:
            with lesson.prepared(self.models[0]):
                yield
        finally:
            self.lesson = before

    def forward(self, side: dict[str, Tensor]) -> Output:
        with self.lesson.taught(self.teacher, self.models[0], side):
            return super().forward(side)

"""Engines of distillation: one that predicts, and one that learns to predict the same on the same ranks.

Shape suffixes: B batch, T sequence, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels.linear_divergence import linear_divergence
from models.lm import Output
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
    """Is asked what it predicts, and does not learn."""

    @torch.no_grad()
    def logits(self, side: dict[str, Tensor]) -> Tensor:
        """[B, T, V] of a micro-batch of this data rank (a collective). Nothing is drawn."""
        refuse_split(self.mesh.config)
        with self._computing():
            out: Output = self.models[0](
                side["tokens"], documents_BT=side.get("documents"), positions_BT=side.get("positions")
            )
        data.reshard(self.models[0])
        assert out.logits is not None
        return out.logits


class Student(Engine):
    """Its loss in training is the divergence from the teacher's predictions; in evaluation it is the cross-entropy."""

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def forward(self, side: dict[str, Tensor]) -> Output:
        teacher_NV = self.teacher.logits(side).flatten(0, 1)
        head = self.models[0].head
        assert head is not None

        def divergence(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
            return linear_divergence(h_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), teacher_NV)

        own, head.cross_entropy = head.cross_entropy, divergence
        try:
            return super().forward(side)
        finally:
            head.cross_entropy = own

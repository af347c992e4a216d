"""A model whose layers are on the ranks of a pipeline, as one that continues texts calls it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.lm import Output
from models.state import State
from parallel.mesh import Mesh
from parallel.pipeline import Stage, walk
from parallel.stages import owner


class Relay:
    """Stands in for a whole `LM` in decoding: all pipeline ranks call it alike, and all get the logits. The caches
    stay where their layers are."""

    def __init__(self, stages: list[Stage], mesh: Mesh) -> None:
        self._stages, self._mesh = stages, mesh

    def __call__(self, tokens_BT: Tensor, *, cache: dict[str, Any], **call: Any) -> Output:
        """As of `LM.forward`, without targets."""
        kept: State = {}
        caches: dict[str, Any] = {}
        logits: list[Tensor] = []

        def run(stage: Stage, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            plan = stage.plan
            state = dict(zip((entry.name for entry in plan.received), tensors, strict=True))
            state |= {entry.name: kept[entry.name] for entry in plan.taken}
            out = stage.model(tokens_BT, state=state or None, cache=cache, **call)
            caches.update(out.cache or {})
            if out.state is None:
                logits.append(out.logits)
                return ()
            kept.update({entry.name: out.state[entry.name] for entry in plan.kept})
            return tuple(out.state[entry.name] for entry in plan.sent)

        walk(self._stages, self._mesh, run)
        return Output(logits=self._on_all(*logits), cache=caches)

    def _on_all(self, logits_BKV: Tensor | None = None) -> Tensor:
        """What the last stage's rank gives, on all."""
        mesh = self._mesh
        last = owner(mesh.config.num_stages - 1, mesh.config)
        about: list[Any] = [None if logits_BKV is None else (logits_BKV.shape, logits_BKV.dtype)]
        dist.broadcast_object_list(about, group=mesh.pp.group, group_src=last)
        if logits_BKV is None:
            shape, dtype = about[0]
            logits_BKV = torch.empty(shape, dtype=dtype, device=mesh.device)
        logits_BKV = logits_BKV.contiguous()
        dist.broadcast(logits_BKV, group=mesh.pp.group, group_src=last)
        return logits_BKV

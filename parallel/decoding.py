"""A model whose layers are on the ranks of a pipeline, as one that continues texts calls it.

What crosses a boundary may have another length at every call: its shapes are sent in front of it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.lm import Output
from models.state import State
from parallel.mesh import Mesh
from parallel.pipeline import Stage
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
        out = Output()
        for stage in self._stages:
            plan = stage.plan
            state: State = {}
            if plan.index:
                state = self._received(stage, out)
                state |= {entry.name: kept[entry.name] for entry in plan.taken}
            out = stage.model(tokens_BT, state=state or None, cache=cache, **call)
            caches |= out.cache or {}
            if out.state is not None:
                kept |= {entry.name: out.state[entry.name] for entry in plan.kept}
                self._send(stage, out.state)
        return Output(logits=self._logits(out.logits), cache=caches)

    def _received(self, stage: Stage, before: Output) -> State:
        """What the stage in front sends. before: the output of this rank's last one."""
        plan = stage.plan
        source = owner(plan.index - 1, self._mesh.config)
        if source == plan.rank:
            assert before.state is not None
            return {entry.name: before.state[entry.name] for entry in plan.received}
        shapes: list[Any] = [None]
        dist.recv_object_list(shapes, group=self._mesh.pp.group, group_src=source)
        state = {}
        for name, shape, dtype in shapes[0]:
            state[name] = torch.empty(shape, dtype=dtype, device=self._mesh.device)
            dist.recv(state[name], group=self._mesh.pp.group, group_src=source)
        return state

    def _send(self, stage: Stage, state: State) -> None:
        plan = stage.plan
        target = owner(plan.index + 1, self._mesh.config)
        if target == plan.rank:
            return
        sent = {entry.name: state[entry.name].contiguous() for entry in plan.sent}
        shapes = [(name, x.shape, x.dtype) for name, x in sent.items()]
        dist.send_object_list([shapes], group=self._mesh.pp.group, group_dst=target)
        for x in sent.values():
            dist.send(x, group=self._mesh.pp.group, group_dst=target)

    def _logits(self, logits_BKV: Tensor | None) -> Tensor:
        """Of the last stage's rank, on all."""
        last = owner(self._mesh.config.num_stages - 1, self._mesh.config)
        about = [None if logits_BKV is None else (logits_BKV.shape, logits_BKV.dtype)]
        dist.broadcast_object_list(about, group=self._mesh.pp.group, group_src=last)
        if logits_BKV is None:
            assert about[0] is not None
            shape, dtype = about[0]
            logits_BKV = torch.empty(shape, dtype=dtype, device=self._mesh.device)
        logits_BKV = logits_BKV.contiguous()
        dist.broadcast(logits_BKV, group=self._mesh.pp.group, group_src=last)
        return logits_BKV

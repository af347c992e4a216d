"""Pipelined backpropagation with what makes up for late gradients (arXiv 2003.11666). Experimental.

A gradient that is D updates late misses D decaying shares of itself that momentum would have added to the weights:
spike compensation adds them at once,

    v <- m v + g,   w <- w - lr (a v + b g),   a = m^D,   b = (1 - m^D) / (1 - m)

Linear weight prediction goes forward with the weights that are expected when the gradient arrives, w - lr D v; together
with spike compensation w + D (w - w'), w' those before the last update. Learning rate and momentum are those of a whole
step and are scaled to its N micro-batches: m^(1/N), lr (1 - m^(1/N)) / ((1 - m) N).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from models.lm import LM
from parallel.asynchronous import RankWire, cycles
from parallel.engine import Batch, Engine
from parallel.gradients import Held
from parallel.mesh import Mesh
from parallel.pipeline import Record
from parallel.stages import plan
from trainer.engines.base import EngineConfig
from trainer.optim.sgd import SGD, VELOCITY, SGDConfig
from trainer.state import Updater

if TYPE_CHECKING:
    from trainer.config import RunConfig

Mitigation = Literal["none", "spike", "prediction", "both"]


@dataclasses.dataclass(frozen=True)
class AsynchronousConfig(EngineConfig, kind="asynchronous"):
    """Every pipeline stage updates its weights after each micro-batch, with gradients that are late; the numbers are
    not those of other engines. mitigation: of the lateness: spike compensation, weight prediction, both or none.
    """

    mitigation: Mitigation = "both"

    def refuse(self, run: "RunConfig") -> None:
        for what, rest in reasons(run):
            raise ValueError(f"asynchronous {what}; {rest}, or use engine.kind=native")

    def build(self, run: "RunConfig", mesh: Mesh) -> tuple[Engine, Updater]:
        engine = AsynchronousEngine(
            run.model,
            mesh,
            seed=run.run.seed,
            dtype=getattr(torch, run.train.dtype),
            sequence=run.data.sequence_length,
        )
        assert isinstance(run.optim, SGDConfig)
        engine.updates = DelayedSGD(engine, run.optim, self.mitigation, run.micro_batches)
        return engine, engine.updates


def reasons(run: "RunConfig") -> Iterator[tuple[str, str]]:
    """What of a run stands against it, and what to change."""
    mesh = run.mesh
    if mesh.pp == 1 or mesh.world_size != mesh.pp or mesh.schedule != "1f1b":
        yield f"is for pipeline ranks with one stage each, and the mesh is {mesh}", "use mesh.pp=2 and nothing else"
    if not isinstance(run.optim, SGDConfig):
        yield f"has SGD's updates alone, and optim.kind is {run.optim.kind}", "use optim.kind=sgd"
    if run.optim.clip is not None:
        yield f"updates before a step's norm is known, and optim.clip is {run.optim.clip}", "use optim.clip=null"
    if run.optim.offload is not None:
        yield "keeps SGD's state on the device, and optim.offload is given", "leave it out"
    if run.optim.sparsity.kind != "none":
        yield f"updates within a step, and optim.sparsity is {run.optim.sparsity.kind}", "leave it out"
    if run.train.dtype == "bfloat16":
        yield "changes weights within a step, which bfloat16 computes with a copy of", "use train.dtype=float32"
    if not run.memory.once:
        yield f"changes weights between the passes, and memory {run.memory.kind} runs layers twice", "use memory none"
    if run.train.compile:
        yield "does not run compiled layers", "leave train.compile out"
    if run.train.faults.policy != "stop":
        yield "has taken a step before its loss is known, and train.faults.policy is skip", "use policy stop"
    if mesh.pp > 1 and (name := shared(run)):
        yield f"updates a stage by itself, and {name} is on several", "use untied weights"


def shared(run: "RunConfig") -> str | None:
    """A parameter that several stages hold, if there is one."""
    with torch.device("meta"):
        model = LM(run.model)
    place = {f"layers.{i}.": p.index for p in plan(model, run.mesh, 1) for i in range(p.start, p.stop)}
    place |= {"embed.": 0, "embed_norm.": 0, "opener.": 0}

    def stage(name: str) -> int:
        return next((at for prefix, at in place.items() if name.startswith(prefix)), run.mesh.pp - 1)

    return next((owner for name, owner in model.owners.items() if stage(name) != stage(owner)), None)


class AsynchronousEngine(Engine):
    """updates: set once the engine is built."""

    updates: "DelayedSGD"

    def _pipelined(self, batch: Batch, micro_batches: int, scale: float) -> Record:
        (stage,) = self.stages
        stage.scale, stage.record = scale, Record()
        chunks = {name: x.chunk(micro_batches) for name, x in batch.side().items()}
        sides = [{name: parts[index] for name, parts in chunks.items()} for index in range(micro_batches)]
        wire = RankWire(self.mesh)
        self.updates.begin_step()
        for _ in cycles(stage, self.mesh, wire, self.updates, sides):
            pass
        self.updates.end_step()
        return stage.record


class DelayedSGD(SGD):
    """SGD by micro-batches. count: of them in a step."""

    def __init__(self, engine: Engine, config: SGDConfig, mitigation: Mitigation, count: int) -> None:
        super().__init__(engine, config)
        self._spikes, self._predicts = mitigation in ("spike", "both"), mitigation in ("prediction", "both")
        self._count, self._lr = count, 0.0
        self.momentum = config.momentum ** (1 / count)
        # Of a gradient as it enters the velocity, which so is as large as synchronous SGD's, whatever the count.
        self._gain = (1 - self.momentum) / (1 - config.momentum)
        self._before: dict[nn.Parameter, Tensor] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}

    def begin(self, lr: float) -> None:
        self._lr = lr

    def step(self, lr: float) -> None:
        """It has been taken."""

    def begin_step(self) -> None:
        """What was last changed is known within a step only, so that a run which resumes goes on alike."""
        held = list(self.engine.held())
        self._before = {one.parameter: one.parameter.detach().clone() for one in held} if self._spikes else {}
        self._sums = {one.parameter: torch.zeros_like(one.parameter) for one in held}

    def end_step(self) -> None:
        """Leave the gradients' sums where the norm is taken of them."""
        for parameter, total in self._sums.items():
            parameter.grad = total

    def rate(self, held: Held) -> float:
        """Of one micro-batch's update."""
        return self._lr * self.setting(held).lr_scale / self._count

    @contextlib.contextmanager
    def ahead(self, delay: int) -> Iterator[None]:
        if not self._predicts or not delay:
            yield
            return
        held = list(self.engine.held())
        current = [one.parameter.detach().clone() for one in held]
        for one in held:
            # By .data, here and below: autograd must not mind that weights change between a micro-batch's passes.
            one.parameter.data.add_(self._expected(one), alpha=delay)
        yield
        for one, weight in zip(held, current, strict=True):
            one.parameter.data.copy_(weight)

    def _expected(self, held: Held) -> Tensor:
        """By how much the next update is expected to change a weight."""
        if self._spikes:
            return held.parameter.detach() - self._before[held.parameter]
        return self.state(held)[VELOCITY] * -self.rate(held)

    @torch.no_grad()
    def arrived(self, delay: int) -> None:
        a, b = spike(self.momentum, delay) if self._spikes else (1.0, 0.0)
        for one in self.engine.held():
            # The micro-batch's own mean came divided by the tokens of the whole step.
            gradient = one.gradient * (self._count * self._gain)
            self._sums[one.parameter] += one.gradient
            if self._spikes:
                self._before[one.parameter] = one.parameter.detach().clone()
            velocity = self.state(one)[VELOCITY].mul_(self.momentum).add_(gradient)
            rate = self.rate(one)
            one.parameter.data.mul_(1 - rate * self.setting(one).weight_decay)
            one.parameter.data.add_(a * velocity + b * gradient, alpha=-rate)
            one.parameter.grad = None


def spike(momentum: float, delay: int) -> tuple[float, float]:
    """(a, b): what the velocity and the gradient are multiplied with in an update of a gradient that is so late."""
    return momentum**delay, (1 - momentum**delay) / (1 - momentum)

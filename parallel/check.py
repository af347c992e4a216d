"""`weft check`: one optimiser step of a config on a mesh of gloo processes, compared with one process.

Compared, in float64: initial weights bit for bit, the loss, every parameter's gradient, the gradient norm, routing
statistics, every parameter after an optimiser step from a clipped gradient, and that replicas stayed bitwise equal. The
batch has uneven token counts, packed documents, padding and a length that does not divide; zero initialisations are
shaken first.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.loss import IGNORE
from models.memory.base import MemoryConfig
from models.memory.none import NoneConfig
from parallel import pipeline
from parallel.compiled import refuse_schedule
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.preflight import refuse, refuse_memory
from parallel.replicas import differences
from parallel.testing import Pool

CLIP = 0.5
MOST_RANKS = 64


def adamw_step(engine: Engine) -> None:
    """Update every parameter: one optimiser per mesh that they live on, since those cannot be mixed.

    Fused, as runs do it: that reads memory as it lies, and so sees a gradient that is not laid out as its parameter.
    """
    groups: dict[object, list[Tensor]] = {}
    for held in engine.held():
        parameter = held.parameter
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    for group in groups.values():
        torch.optim.AdamW(group, lr=0.01, fused=True).step()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The batch of a check. sequences: per data rank and micro-batch. update: the optimiser's step. compile, memory:
    the mesh's side, while one process stays eager and keeps all activations."""

    seed: int = 0
    length: int = 19
    sequences: int = 1
    micro_batches: int | None = None
    packed: bool = True
    dtype: torch.dtype = torch.float64
    update: Callable[[Engine], None] = adamw_step
    compile: bool = False
    memory: MemoryConfig = dataclasses.field(default_factory=NoneConfig)


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Float64 leaves 1e-12 for sums in another order; float32 errors are 2^29 times as large."""

    loss: float
    gradient: float
    parameter: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Tolerance":
        return cls(1e-12, 1e-9, 1e-9) if dtype == torch.float64 else cls(1e-5, 1e-3, 1e-3)


@dataclasses.dataclass
class Report:
    """What differed. Errors are relative to the largest element of the reference."""

    mesh: str
    tolerance: Tolerance
    loss: float
    norm: float
    gradients: dict[str, float]
    parameters: dict[str, float]
    statistics: dict[str, float]
    initial: list[str]
    replicas: list[str]

    @property
    def wrong(self) -> list[str]:
        """One line for everything out of tolerance."""
        lines = [f"initial weight {name} differs from one process's" for name in self.initial]
        lines += [f"replicas of {name} differ after the step" for name in self.replicas]
        for what, error, limit in (
            ("loss", self.loss, self.tolerance.loss),
            ("gradient norm", self.norm, self.tolerance.gradient),
        ):
            if not error <= limit:
                lines.append(f"{what}: {error:.1e} > {limit:.0e}")
        for what, errors, limit in (
            ("gradient of", self.gradients, self.tolerance.gradient),
            ("updated", self.parameters, self.tolerance.parameter),
            ("statistic", self.statistics, self.tolerance.gradient),
        ):
            lines += [
                f"{what} {name}: {error:.1e} > {limit:.0e}" for name, error in errors.items() if not error <= limit
            ]
        return lines

    @property
    def ok(self) -> bool:
        return not self.wrong

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        return sorted(self.gradients.items(), key=lambda item: -item[1])[:count]

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "wrong": self.wrong, **dataclasses.asdict(self)}


def micro_batches(mesh: MeshConfig, settings: Settings) -> int:
    """Enough for the schedule, and at least two, so that accumulation is part of every check."""
    return settings.micro_batches or max(2, 2 * mesh.pp)


def make_batch(config: LMConfig, mesh: MeshConfig, settings: Settings) -> Batch:
    """The whole step's sequences, micro-batch-major: what one process sees."""
    count = micro_batches(mesh, settings) * mesh.replicate * mesh.shard * settings.sequences
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (count, settings.length)
    # No token follows itself: at the start of a document both would be in the same state but for rounding, and routers
    # that compare tokens would choose between them by that, otherwise on each mesh.
    steps = torch.randint(1, max(config.vocab_size, 2), shape, generator=generator)
    tokens = steps.cumsum(1) % config.vocab_size
    targets = torch.randint(config.vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < torch.linspace(0, 0.6, count)[:, None]] = IGNORE
    keys = torch.randint(2**32, (count,), generator=generator)
    if not settings.packed:
        return Batch(tokens, targets, keys=keys)
    starts = torch.rand(shape, generator=generator) < 0.2
    starts[:, 0] = True
    documents = starts.long().cumsum(1) - 1
    index = torch.arange(settings.length).expand(shape)
    positions = index - index.where(starts, 0).cummax(1).values
    padding = index >= settings.length - torch.arange(count)[:, None] % 3
    documents[padding], targets[padding] = -1, IGNORE
    return Batch(tokens, targets, documents, positions, keys)


def share(batch: Batch, count: int, data_rank: int, data_size: int) -> Batch:
    """One data rank's part of every micro-batch."""

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([m.chunk(data_size)[data_rank] for m in x.chunk(count)])

    return Batch(*(part(getattr(batch, field.name)) for field in dataclasses.fields(Batch)))  # type: ignore[arg-type]


def shaken(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Zero and identity initialisations hide paths: add noise to everything."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in sorted(state.items())
    }


@dataclasses.dataclass
class Step:
    """Everything a step leaves, whole tensors."""

    initial: dict[str, Tensor]
    state: dict[str, Tensor]
    loss: float
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    statistics: dict[str, Tensor]


def take_step(engine: Engine, batch: Batch, count: int, state: dict[str, Tensor] | None, settings: Settings) -> Step:
    """Initial weights, then (from `state`, or shaken) one step. `parameters` holds buffers too."""
    initial = engine.full_state()
    state = state if state is not None else shaken(initial, settings.seed)
    engine.load_full_state(state)
    out = engine.step_gradients(batch, count)
    norm = engine.grad_norm()
    gradients = engine.whole_tensors(lambda held: held.parameter.grad)
    engine.clip(CLIP, norm)
    settings.update(engine)
    engine.after_step(out.stats)
    statistics = {**out.stats, **out.losses}
    return Step(initial, state, float(out.loss), float(norm), gradients, engine.full_state(), statistics)


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """max |got - expected| over max |expected|; inf where got is not finite or the shape differs."""
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = max(largest(expected), floor, 1e-300)
    return float((got - expected).abs().max()) / scale


def largest(x: Tensor) -> float:
    """In magnitude; 0 of no elements."""
    return float(x.abs().max()) if x.numel() else 0.0


def relative(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), 1e-300)


def run_rank(
    config_plain: dict[str, Any], mesh_config: MeshConfig, settings: Settings, reference_file: str
) -> dict[str, Any]:
    """One rank's part of a check. Returns its errors by name."""
    config: LMConfig = instantiate(LMConfig, config_plain)
    reference: Step = torch.load(reference_file, weights_only=False)
    mesh = Mesh(mesh_config)
    count = micro_batches(mesh_config, settings)
    batch = share(make_batch(config, mesh_config, settings), count, mesh.data_rank, mesh.data_size)
    engine = Engine(
        config,
        mesh,
        seed=settings.seed,
        dtype=settings.dtype,
        compile=settings.compile,
        memory=settings.memory,
        sequence=settings.length,
    )
    step = take_step(engine, batch, count, reference.state, settings)
    floor = 1e-5 * max(largest(g) for g in reference.gradients.values())
    return {
        "initial": [name for name, value in step.initial.items() if not torch.equal(value, reference.initial[name])],
        "missing": sorted(reference.initial.keys() - step.initial.keys()),
        "loss": relative(step.loss, reference.loss),
        "norm": relative(step.norm, reference.norm),
        "gradients": {n: error(g, reference.gradients[n], floor) for n, g in step.gradients.items()},
        # A step that takes a weight close to zero leaves it with the rounding of what it was.
        "parameters": {
            n: error(p, reference.parameters[n], largest(reference.state[n])) for n, p in step.parameters.items()
        },
        "statistics": {n: error(step.statistics[n], s) for n, s in reference.statistics.items()},
        "replicas": [found.name for found in differences(engine)],
    }


def refuse_combination(config: LMConfig, mesh: MeshConfig, settings: Settings) -> None:
    """Raise ValueError if the mesh or the type cannot hold the model, or the schedule cannot run the batch."""
    if mesh.world_size > MOST_RANKS:
        raise ValueError(
            f"the mesh takes {mesh.world_size} processes and a check runs them all on this machine, at most "
            f"{MOST_RANKS}; check degrees whose product is no more than that"
        )
    config.residual.check_dtype(settings.dtype)
    refuse(config, mesh, settings.memory, settings.compile)
    refuse_memory(config, mesh, settings.memory, settings.compile)
    if settings.compile:
        refuse_schedule(mesh)
    if mesh.pp > 1:
        pipeline.refuse(mesh, len(config.expanded), micro_batches(mesh, settings))


def run(
    config: LMConfig,
    mesh: MeshConfig,
    settings: Settings | None = None,
    pool: Pool | None = None,
    timeout: float = 300.0,
    task: Callable[..., dict[str, Any]] = run_rank,
) -> Report:
    """Compare `config` on `mesh` with one process. `task` is what every rank runs.

    Raises ValueError, before a process is started, when the combination is refused.
    """
    settings = settings or Settings()
    refuse_combination(config, mesh, settings)
    engine = Engine(config, Mesh.single(), seed=settings.seed, dtype=settings.dtype)
    count = micro_batches(mesh, settings)
    reference = take_step(engine, make_batch(config, mesh, settings), count, None, settings)
    if not math.isfinite(reference.loss) or not math.isfinite(reference.norm):
        raise ValueError(
            f"on one process the loss is {reference.loss} and the gradient norm {reference.norm}, so there is nothing "
            "to compare with; mend the config first"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "reference.pt")
        torch.save(reference, file)
        arguments = (to_plain(config), mesh, settings, file)
        if pool is not None:
            ranks = pool.run(task, mesh.world_size, *arguments, timeout=timeout)
        else:
            with Pool(mesh.world_size) as own:
                ranks = own.run(task, mesh.world_size, *arguments, timeout=timeout)

    def worst(what: str) -> dict[str, float]:
        names = {name for rank in ranks for name in rank[what]}
        return {name: max(rank[what].get(name, 0.0) for rank in ranks) for name in sorted(names)}

    missing = set(reference.gradients) - set(worst("gradients"))
    assert not missing, f"no rank holds {sorted(missing)}"
    return Report(
        str(mesh),
        Tolerance.of(settings.dtype),
        max(rank["loss"] for rank in ranks),
        max(rank["norm"] for rank in ranks),
        worst("gradients"),
        worst("parameters"),
        worst("statistics"),
        sorted({name for rank in ranks for name in rank["initial"] + rank["missing"]}),
        sorted({name for rank in ranks for name in rank["replicas"]}),
    )

"""Where a pipeline's layers are: which stage has which, which rank has which stage, and what has to be sent.

A rank with two stages has seen what its first one was sent, made and passed on. What its second one needs of that it
takes from there, and no wire carries it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from models.cost import Cost, part_costs
from models.lm import LM, LOSSES
from models.plan import boundary_bytes
from models.state import Entry
from parallel.mesh import V_SHAPED, MeshConfig

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Stage `index` of a pipeline, on pipeline rank `rank`, with layers start..stop-1.

    received, sent: the entries that come from the stage before, and go to the one behind. taken: those that an earlier
    stage of the same rank has kept for it. kept: those that it keeps for a later one. cost: of its parts.
    """

    index: int
    rank: int
    start: int
    stop: int
    received: tuple[Entry, ...]
    sent: tuple[Entry, ...]
    taken: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    cost: Cost


def owner(stage: int, mesh: MeshConfig) -> int:
    """The pipeline rank that runs `stage`: in a loop, or down and up again (V)."""
    turned_back = mesh.schedule in V_SHAPED and stage >= mesh.pp
    return 2 * mesh.pp - 1 - stage if turned_back else stage % mesh.pp


def refuse_stages(mesh: MeshConfig, num_layers: int) -> None:
    """Raise ValueError where the layers do not fill the stages, with the nearest thing that works."""
    stages = mesh.num_stages
    if mesh.sizes is not None and sum(mesh.sizes) != num_layers:
        raise ValueError(
            f"stages={mesh.stages} places {sum(mesh.sizes)} layers and the model has {num_layers}; "
            "change one of its numbers, or leave stages out and they are cut by cost"
        )
    if mesh.sizes is None and stages > num_layers:
        one = stages == mesh.pp
        fit = "" if one else f" (two per rank under {mesh.schedule})"
        most = num_layers * mesh.pp // stages
        alone = "pp=1" if mesh.schedule == "1f1b" else "pp=1 without a schedule"
        raise ValueError(
            f"pp={mesh.pp} makes {stages} stages{fit} and the number of layers is {num_layers}; "
            f"use {f'pp={most}' if most > 1 else alone}"
            + (", or a schedule with one stage per rank such as 1f1b" if not one and mesh.pp <= num_layers else "")
        )


def plan(model: LM, mesh: MeshConfig, sequence: int) -> list[StagePlan]:
    """All stages of a whole model, which may be on meta. sequence: tokens of one, by which cores are weighed.

    Raises ValueError where the layers do not fill the stages.
    """
    refuse_stages(mesh, len(model.blocks))
    costs = part_costs(model, sequence)
    spans = cuts(costs, mesh, mirrored=model.config.depth.mirrors and mesh.schedule in V_SHAPED)
    routes = Routes(model, spans, [owner(index, mesh) for index in range(len(spans))])
    plans = []
    for index, (start, stop) in enumerate(spans):
        before, behind = model.boundaries[start] if index else [], model.boundaries[stop]
        plans.append(
            StagePlan(
                index,
                owner(index, mesh),
                start,
                stop,
                received=named(before, routes.received[index]),
                sent=named(behind, routes.received[index + 1]) if index + 1 < len(spans) else (),
                taken=named(before, routes.taken[index]),
                kept=named(behind, routes.kept(index)),
                cost=total(within(costs, start, stop)),
            )
        )
    return plans


def told(plans: Sequence[StagePlan], tokens: int, stream: torch.dtype) -> str:
    """One line on a pipeline: its cuts, and the bytes that its boundaries carry for so many tokens of a data rank."""
    spans = " | ".join(f"{s.start}" if s.stop == s.start + 1 else f"{s.start}-{s.stop - 1}" for s in plans)
    flops = [s.cost.flops_per_token for s in plans]
    sent = ", ".join(f"{boundary_bytes(s.sent, tokens, stream) / 2**20:,.2f}" for s in plans[:-1])
    return (
        f"pipeline: layers {spans}, the slowest stage {max(flops) * len(flops) / sum(flops) - 1:.0%} above their mean; "
        f"a micro-batch sends {sent} MiB over the boundaries"
    )


def named(boundary: Sequence[Entry], names: set[str]) -> tuple[Entry, ...]:
    """In the boundary's order, which both of its sides know."""
    return tuple(entry for entry in boundary if entry.name in names)


class Routes:
    """received, taken: by stage, the names of what it has from the stage before, and from an earlier one of its rank.

    From the last stage to the first: what a stage reads or has to pass on, and did not make, it takes from its rank's
    earlier stage if that one comes no sooner than where it was made; which then has to have it too.
    """

    def __init__(self, model: LM, spans: list[Span], ranks: list[int]) -> None:
        self._ranks = ranks
        touched = [events(model, span, len(spans), index) for index, span in enumerate(spans)]
        needed = [set(reads) for reads, _ in touched]
        self.received: list[set[str]] = [set() for _ in spans]
        self.taken: list[set[str]] = [set() for _ in spans]
        for index in range(len(spans) - 1, 0, -1):
            earlier = self._earlier(index)
            for name in needed[index]:
                maker = max(stage for stage in range(index) if name in touched[stage][1])
                # The stage right before hands things over by itself, on the same rank too.
                if earlier is not None and maker <= earlier < index - 1:
                    self.taken[index].add(name)
                    source = earlier
                else:
                    self.received[index].add(name)
                    source = index - 1
                if maker < source:
                    needed[source].add(name)

    def _earlier(self, index: int) -> int | None:
        same = [stage for stage in range(index) if self._ranks[stage] == self._ranks[index]]
        return same[-1] if same else None

    def kept(self, index: int) -> set[str]:
        """What a later stage of the rank takes from this one."""
        later = [stage for stage in range(index + 1, len(self._ranks)) if self._ranks[stage] == self._ranks[index]]
        return set(self.taken[later[0]]) if later else set()


def events(model: LM, span: Span, stages: int, index: int) -> tuple[set[str], set[str]]:
    """(entries that a stage reads and did not make, entries that it writes or changes)."""
    assert model.opener is not None and model.closer is not None
    reads: set[str] = set()
    writes = {entry.name for entry in model.opener.writes} if index == 0 else set[str]()
    for layer in model.blocks[slice(*span)]:
        reads |= set(layer.changes()) - writes
        writes |= set(layer.changes())
        for step_reads, step_writes in layer.events():
            reads |= set(step_reads) - writes
            writes |= {entry.name for entry in step_writes}
        if layer.has_losses:
            if LOSSES in model.boundaries[layer.index] and LOSSES.name not in writes:
                reads.add(LOSSES.name)
            writes.add(LOSSES.name)
    if index == stages - 1:
        reads |= set(model.closer.reads) - writes
        if LOSSES in model.boundaries[-1] and LOSSES.name not in writes:
            reads.add(LOSSES.name)
    return reads, writes


def within(costs: list[Cost], start: int, stop: int) -> list[Cost]:
    """Of layers start..stop-1, with what lies before the first and behind the last layer of the model."""
    depth = len(costs) - 2
    return costs[start + (start > 0) : stop + 1 + (stop == depth)]


def total(costs: list[Cost]) -> Cost:
    return Cost(
        sum(cost.parameters for cost in costs),
        sum(cost.active for cost in costs),
        sum(cost.flops_per_token for cost in costs),
    )


def cuts(costs: list[Cost], mesh: MeshConfig, mirrored: bool = False) -> list[Span]:
    """Layers start..stop-1 of each stage, as `mesh.stages` says or by cost.

    By cost: the slowest stage has as few FLOPs as can be, as every turn of a schedule takes as long as its slowest
    stage; of those cuts, the stage with most parameters has as few as can be; of those, all are as even as can be.
    mirrored: stages of one rank under a V schedule have layers that mirror one another. costs: as of `part_costs`.
    """
    depth, stages = len(costs) - 2, mesh.num_stages
    if mesh.sizes is not None:
        edges = [0, *itertools.accumulate(mesh.sizes)]
        return list(itertools.pairwise(edges))
    if mirrored:
        front = partition(
            depth // 2,
            stages // 2,
            lambda start, stop: [stage_cost(costs, start, stop), stage_cost(costs, depth - stop, depth - start)],
        )
        return [*front, *((depth - stop, depth - start) for start, stop in reversed(front))]
    return partition(depth, stages, lambda *span: [stage_cost(costs, *span)])


def stage_cost(costs: list[Cost], start: int, stop: int) -> Cost:
    return total(within(costs, start, stop))


def partition(count: int, parts: int, costs: Callable[[int, int], list[Cost]]) -> list[Span]:
    """`count` layers in order as `parts` spans of one or more. costs: of the stages that a span makes."""
    longest = count - parts + 1
    spans = {(i, j): costs(i, j) for i in range(count) for j in range(i + 1, min(i + longest, count) + 1)}
    flops = {span: max(cost.flops_per_token for cost in made) for span, made in spans.items()}
    sizes = {span: float(max(cost.parameters for cost in made)) for span, made in spans.items()}
    most, _ = best(count, parts, flops, max)
    flops = {span: value for span, value in flops.items() if value <= most}
    most, _ = best(count, parts, {span: sizes[span] for span in flops}, max)
    flops = {span: value**2 for span, value in flops.items() if sizes[span] <= most}
    return best(count, parts, flops, lambda a, b: a + b)[1]


def best(
    count: int, parts: int, costs: dict[Span, float], join: Callable[[float, float], float]
) -> tuple[float, list[Span]]:
    """The least joined cost of `parts` of the spans that follow one another from 0 to `count`, and those spans."""
    ends: dict[int, list[int]] = {}
    for start, stop in costs:
        ends.setdefault(stop, []).append(start)
    found: dict[int, tuple[float, list[Span]]] = {0: (0.0, [])}
    for _ in range(parts):
        found = {
            stop: min(
                (join(found[start][0], costs[start, stop]), [*found[start][1], (start, stop)])
                for start in starts
                if start in found
            )
            for stop, starts in ends.items()
            if any(start in found for start in starts)
        }
    return found[count]

"""What `weft convert` is asked for: a plain model as one whose residual can be undone, and every refusal of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import at
from configs.load import merge, override
from configs.structure import instantiate
from configs.validate import parse
from models.compare import differences, said
from models.config import LMConfig
from models.hf.folder import is_exported
from models.limits import at_least
from models.residual.following import Following
from models.residual.plain import PlainResidual
from models.slots import ResidualConfig
from parallel.distillation import refuse_split
from parallel.mesh import MeshConfig
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.newfolder import refuse_taken
from trainer.optim.groups import whole_specs
from trainer.preflight import refuse_data, refuse_run


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    source: folder of a run or of a checkpoint. out: the folder to write, new or empty. residual: its kind. steps: of
    distillation. overrides: of the source's config. limit: sequences to evaluate on (default: all of data.valid). fit:
    steps of the lesson layer by layer before it (default: a quarter as many where the residual has it and it pays, or
    an estimate is given). estimate: iterations of the fixed point in that lesson (default: its limit).
    """

    source: Path
    out: Path
    residual: str
    steps: int
    overrides: tuple[str, ...] = ()
    limit: int | None = None
    fit: int | None = None
    estimate: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "steps", "fit")
        at_least(self, 1, "limit", "estimate")


@dataclasses.dataclass(frozen=True)
class Plan:
    """path: the checkpoint. source: its config. target: what the new folder says. work: the target on the mesh that
    converts. first_sample: where the source's order goes on. fit: steps of the lesson layer by layer."""

    path: Path
    source: RunConfig
    target: RunConfig
    work: RunConfig
    first_sample: int
    fit: int


def plan(request: Request, mesh: MeshConfig | None, warn: Callable[[str], None], hashes: bool = True) -> Plan:
    """mesh: of the work (default: the run's). Raises ValueError, one sentence, for what cannot be converted."""
    refuse_taken(request.out, "convert")
    refuse_residual(request.residual)
    fit = fitting_steps(request)
    if is_exported(request.source):
        raise ValueError(
            f"{request.source} is a Hugging Face folder; take it up with weft import, and convert what that writes"
        )
    path = checkpoint.choose(request.source, warn, hashes)
    content = checkpoint.read(path)
    source: RunConfig = instantiate(RunConfig, content.config)
    if source.model.residual.kind != PlainResidual.kind:
        raise ValueError(
            f"the model of {path} has residual {source.model.residual.kind}, and only one with residual plain can be "
            "converted; give the checkpoint of such a model"
        )
    target = target_config(request, content.config)
    refuse_changes(path, source.model, target.model)
    work = dataclasses.replace(target, mesh=mesh or target.mesh, run=dataclasses.replace(target.run, init_from=None))
    refuse_split(work.mesh)
    refuse_run(work)
    if work.data.task is None and work.data.valid is None:
        raise ValueError(
            f"the run of {path} has no data.valid, on which the loss is measured before and after; give "
            "data.valid=PREFIX"
        )
    refuse_data(work)
    return Plan(path, source, target, work, content.state.samples, fit)


def refuse_residual(kind: str) -> None:
    """Raise ValueError for a residual that cannot be undone."""
    if not ResidualConfig.of_kind(kind).steps:
        ways = ResidualConfig.such_as(lambda other: bool(other.steps))
        raise ValueError(
            f"residual {kind} cannot be undone, and models are converted to ones that can; give one of those{ways}"
        )


def fitting_steps(request: Request) -> int:
    """Of the lesson layer by layer. Raises ValueError where it is asked for and cannot be given."""
    residual = ResidualConfig.of_kind(request.residual)
    if issubclass(residual, Following):
        usual = request.steps // 4 if residual.pays or request.estimate is not None else 0
        fit = usual if request.fit is None else request.fit
        if request.estimate is not None and fit == 0:
            raise ValueError(
                f"--estimate is {request.estimate}, and with --fit {fit} no layer is fitted to it; leave it out, or "
                "give a --fit of at least 1"
            )
        return fit
    asked = {"--fit": request.fit or None, "--estimate": request.estimate}
    for option, value in asked.items():
        if value is not None:
            ways = ResidualConfig.such_as(lambda other: issubclass(other, Following))
            raise ValueError(
                f"{option} is {value}, and layers with residual {request.residual} cannot each be fitted to a plain "
                f"layer's step; leave it out, or take a residual with which they can{ways}"
            )
    return 0


def target_config(request: Request, source: dict[str, Any]) -> RunConfig:
    """The source's config with the residual and the overrides, as a run of its own that starts from `out`."""
    residual = {"kind": request.residual, **ResidualConfig.of_kind(request.residual).converted}
    run = {**source["run"], "dir": f"{request.out}-trained", "init_from": str(request.out)}
    data = {**source, "model": {**source["model"], "residual": residual}, "run": run}
    for text in request.overrides:
        data = merge(data, override(text, data))
    config: RunConfig = parse(RunConfig, data)
    if config.model.residual.kind != request.residual:
        raise at(
            "model.residual.kind", f"is {config.model.residual.kind}, and --residual {request.residual}; leave it out"
        )
    refuse_run(config)
    return config


def refuse_changes(path: Path, source: LMConfig, target: LMConfig) -> None:
    """Raise ValueError where more than the residual differs, or where the target has parameters of its own."""
    for key, ours, theirs in differences(dataclasses.replace(target, residual=source.residual), source)[:1]:
        raise ValueError(
            f"model.{key} is {said(ours)}, and {said(theirs)} in {path}; a conversion changes model.residual alone, "
            f"leave model.{key} out"
        )
    if own := sorted(whole_specs(target).keys() - whole_specs(source).keys()):
        raise ValueError(
            f"residual {target.residual.kind} has parameters of its own, such as {own[0]}, which a plain model lacks; "
            "give a residual without"
        )

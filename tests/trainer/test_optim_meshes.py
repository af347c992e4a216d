"""An optimiser's step on every mesh is one process's, and a resumed run goes on with its state."""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.validate import parse
from models.ffn import __path__ as ffn_folders
from models.slots import FFNConfig
from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build, plain
from tests.slow import slow
from tests.trainer import runs
from tests.trainer.test_optim import GROUPS, optim
from trainer.optim.base import one_step
from trainer.schedule.base import ScheduleConfig

EVERYDAY = ("tp=2", "pp=2", "hsdp=2x2", "ep=2,fsdp=4")
MORE = ("fsdp=2", "ep=2", "dp=2", "fsdp=2,tp=2,pp=2,schedule=zbv")


@pytest.mark.parametrize("mesh", [*EVERYDAY, *slow(MORE)])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_every_mesh_equals_one_process(kind: str, mesh: str, pool: Pool) -> None:
    """With groups, experts and a head tied to the embedding, whose copies on two stages must stay equal."""
    model = build(**HYBRID, residual="hyper", tie_embeddings=True)
    settings = check.Settings(update=functools.partial(one_step, optim(kind=kind, groups=GROUPS)))
    report = check.run(model, MeshConfig.parse(mesh), settings, pool)
    assert report.ok, report.wrong[:10]


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2)], ids=str)
def test_a_resumed_run_goes_on_in_the_middle(mesh: MeshConfig, tmp_path: Path, pool: Pool) -> None:
    """Moments, counts of updates and the schedule, in its decay: every number of the log is that of a run in one go."""
    data = runs.prepare_data(tmp_path / "data")
    found = []
    for name, run in (("whole", runs.run_through), ("parts", functools.partial(runs.run_interrupted, stop_after=4))):
        config = dataclasses.replace(
            runs.run_config(data, tmp_path / name, mesh),
            optim=optim(kind="muon", groups=[{"match": "head", "lr_scale": 0.5}]),
            schedule=parse(ScheduleConfig, {"kind": "wsd", "warmup": 1, "decay": 3}),
        )
        found.append(pool.run(run, mesh.world_size, config)[0])
    assert found[0] == found[1] and len({record["train/loss"] for record in found[0]}) == 6


FUSED = '''
"""SwiGLU whose gate and up are one matrix of unequal use: rows of gate, then twice as many of a wider up."""

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from models.params import Axis, Linear, Parts
from models.context import LayerContext
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class FusedConfig(FFNConfig, kind="fused"):
    """h = silu(gate x), y = down [h * a, h * b], with gate, a and b in one matrix."""

    hidden: int

    def build(self, ctx: LayerContext) -> FFN:
        return Fused(ctx, self.hidden)


class Fused(FFN):
    def __init__(self, ctx: LayerContext, hidden: int) -> None:
        super().__init__()
        narrow, wide = Axis("ffn", hidden), Axis("ffn", hidden)
        parts = Parts((hidden, 2 * hidden), (narrow, wide))
        self.into = Linear(ctx.d_model, 3 * hidden, axis=parts)
        self.down = Linear(2 * hidden, ctx.d_model, in_axis=Axis("ffn", hidden), init=ctx.output_init)

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        into = self.into(x_BTD)
        gate, wide = into.split([into.shape[-1] // 3, into.shape[-1] * 2 // 3], dim=-1)
        return Result(self.down(wide * F.silu(gate).repeat_interleave(2, -1)))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fused FFN in a folder of plug-ins, which this process forgets afterwards."""
    (tmp_path / "ffn").mkdir()
    (tmp_path / "ffn" / "fused.py").write_text(FUSED)
    monkeypatch.setenv("WEFT_PLUGINS", str(tmp_path))
    yield
    FFNConfig.registry.pop("fused", None)
    sys.modules.pop("models.ffn.fused", None)
    ffn_folders.remove(str(tmp_path / "ffn"))


@pytest.mark.parametrize("mesh", ["tp=2", "fsdp=2,tp=2"])
def test_fused_projections_on_a_mesh(mesh: str, pool: Pool, folder: None) -> None:
    model = build(num_layers=2, ffn={"kind": "fused", "hidden": 8}, mixer=plain("mixer", "attention"))
    settings = check.Settings(update=functools.partial(one_step, optim(kind="muon")))
    report = check.run(model, MeshConfig.parse(mesh), settings, pool)
    assert report.ok, report.wrong[:10]

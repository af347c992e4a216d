"""One file outside the repository makes a new mixer: it trains, runs on meshes and exports, with no other edit."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.config import LMConfig
from models.cost import cost
from models.hf.export import ExportConfig, export
from models.lm import LM
from models.mixers import __path__ as mixer_folders
from models.params import initialize
from models.slots import MixerConfig
from parallel import check
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract import test_contract
from tests.contract.tiny import build

SOURCE = '''
"""Exponential moving average: a decaying mean of the values, with a decay that the token chooses.

Shape suffixes: B batch, T sequence, D model width, H heads, V value width.
"""

import dataclasses
from types import MappingProxyType

import torch
from torch import Tensor

from models.params import Axis, Linear
from models.context import LayerContext
from models.slots import Cache, Mixer, MixerConfig
from models.state import Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class MovingAverageConfig(MixerConfig, kind="moving_average"):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t."""

    num_heads: int
    head_dim: int

    example = MappingProxyType({"num_heads": 4, "head_dim": 4})

    def build(self, ctx: LayerContext) -> Mixer:
        return MovingAverage(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, self.head_dim


class MovingAverage(Mixer):
    def __init__(self, config: MovingAverageConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        axis = Axis("heads", config.num_heads)
        width = config.num_heads * config.head_dim
        self.value = Linear(ctx.d_model, width, axis=axis)
        self.decay = Linear(ctx.d_model, config.num_heads, axis=axis)
        self.out = Linear(width, ctx.d_model, in_axis=axis, init=ctx.output_init)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        v = self.value(views.v_BTD).unflatten(-1, (-1, self.head_dim))
        return Projected({"v": v, "a": self.decay(views.q_BTD).sigmoid()}, {})

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        v_BTHV, a_BTH = heads["v"], heads["a"]
        documents_BT = side.documents_BT if side.documents_BT is not None else torch.zeros_like(side.positions_BT)
        h_BHV = cache["h"] if cache else torch.zeros_like(v_BTHV[:, 0])
        last_B = cache["document"] if cache else documents_BT[:, 0]
        outs = []
        for t in range(v_BTHV.shape[1]):
            document_B, a_BH1 = documents_BT[:, t], a_BTH[:, t, :, None]
            same_B11, real_B11 = (x_B[:, None, None] for x_B in (document_B == last_B, document_B >= 0))
            out_BHV = a_BH1 * h_BHV.where(same_B11, 0) + (1 - a_BH1) * v_BTHV[:, t]
            outs.append(out_BHV)
            # Padding moves nothing, so that the row goes on behind its last token.
            h_BHV, last_B = out_BHV.where(real_B11, h_BHV), document_B.where(document_B >= 0, last_B)
        new_cache = None if cache is None else {"h": h_BHV, "document": last_B}
        return torch.stack(outs, 1), new_cache

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.out(out_BTHV.flatten(-2))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of plug-ins with one file; afterwards this process has forgotten it."""
    (tmp_path / "mixers").mkdir()
    (tmp_path / "mixers" / "moving_average.py").write_text(SOURCE)
    monkeypatch.setenv("WEFT_PLUGINS", str(tmp_path))
    yield tmp_path
    MixerConfig.registry.pop("moving_average", None)
    sys.modules.pop("models.mixers.moving_average", None)
    mixer_folders.remove(str(tmp_path / "mixers"))


# What every kind of the repository is held to.
CONTRACT = [
    test
    for name, test in vars(test_contract).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["config"]
]


def config() -> LMConfig:
    return build(mixer="moving_average", residual="hyper", ffn="moe", values="resformer")


def test_it_is_found_and_trains(folder: Path) -> None:
    assert "moving_average" in MixerConfig.kinds()
    assert cost(config(), 12).flops_per_token > 0  # it does not count its core
    engine = Engine(config(), Mesh.single(), seed=0)
    tokens = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW([held.parameter for held in engine.held()], lr=0.01)
    losses = []
    for _ in range(30):
        losses.append(float(engine.step_gradients(Batch(tokens, tokens), 2).loss))
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mesh", ["fsdp=2,tp=2,pp=2", "cp=2", "tp=4", "ep=2,pp=2,schedule=zbv"])
def test_it_runs_on_meshes(folder: Path, mesh: str, pool: Pool) -> None:
    report = check.run(config(), MeshConfig.parse(mesh), pool=pool)
    assert report.ok, report.wrong


@pytest.mark.parametrize("held_to", CONTRACT, ids=lambda test: test.__name__)
def test_it_keeps_the_contract(folder: Path, held_to: Callable[[LMConfig], None]) -> None:
    held_to(config())


def test_it_decodes(folder: Path) -> None:
    test_contract.test_decode_equals_forward(config(), split=4)


def test_it_exports(folder: Path, tmp_path: Path) -> None:
    """To a folder that transformers loads in a process that knows neither Weft nor the plug-in's folder."""
    model = LM(config())
    initialize(model, 0)
    out = tmp_path / "exported"
    export(model.config, model, out, ExportConfig())
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'models' not in sys.modules\n"
        "torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WEFT_PLUGINS")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-c", script, str(out), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, model(torch.arange(8)[None]).logits, rtol=1e-5, atol=1e-5)

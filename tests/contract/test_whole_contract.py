"""Plug-ins from outside the repository that use all of the contract.

A mixer that routes, writes entries over tokens and over heads, has a loss, statistics and a buffer; and an FFN that all
layers share.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import models.ffn
import models.mixers
from models.config import LMConfig
from models.lm import LM
from models.params import initialize
from models.slots import FFNConfig, MixerConfig
from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import build

ROUTED = '''
"""Linear attention whose heads are weighted by a router that adds up its logits over the layers.

Shape suffixes: B batch, T sequence, H heads, K key and V value width of a head.
"""

import dataclasses

import torch
from torch import Tensor

from models.buffers import Buffers
from models.params import Axis, Linear
from models.context import LayerContext
from models.slots import Cache, Mixer, MixerConfig
from models.state import Entry, Layout, OwnTokens, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class RoutedHeadsConfig(MixerConfig, kind="routed_heads"):
    """Heads with weights."""

    num_heads: int
    head_dim: int
    incremental = False

    def build(self, ctx: LayerContext) -> Mixer:
        return RoutedHeads(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, self.head_dim


class RoutedHeads(Mixer, Buffers):
    has_losses = True

    def __init__(self, config: RoutedHeadsConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, heads, width = config, config.num_heads, config.head_dim
        axis = Axis("heads", heads)
        self.router = Linear(ctx.d_model, heads)
        self.q = Linear(ctx.d_model, heads * width, axis=axis)
        self.k = Linear(ctx.d_model, heads * width, axis=axis)
        self.v = Linear(ctx.d_model, heads * width, axis=axis)
        self.o = Linear(heads * width, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.declare_buffer("bias", (heads,), 0.0)
        if ctx.index > 0:
            self.reads = ("head_logits", "first_key")
        if ctx.index == 0:
            self.writes = (Entry("first_key", (heads, width), Layout.HEADS, heads),)
        if ctx.index < ctx.num_layers - 1:
            self.writes += (Entry("head_logits", (heads,)),)

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        logits_BTH = self.router(views.q_BTD)
        if "head_logits" in inputs:
            logits_BTH = logits_BTH + inputs["head_logits"]
        share_BTH = (logits_BTH + self.bias.to(logits_BTH.dtype)).softmax(-1)
        valid_BT = side.valid_BT
        square_BT = logits_BTH.logsumexp(-1).square()
        best = torch.nn.functional.one_hot(share_BTH.detach().argmax(-1), self.config.num_heads)
        return OwnTokens(
            made={"total": logits_BTH.sum(-1)},
            made_by_head={"share": share_BTH},
            writes={"head_logits": logits_BTH} if any(e.name == "head_logits" for e in self.writes) else {},
            losses={"head_z": 0.01 * (square_BT * valid_BT).sum()},
            stats={"picks": (best * valid_BT[..., None]).sum((0, 1)).to(torch.float64)},
        )

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        width = self.config.head_dim
        q, k, v = (f(x).unflatten(-1, (-1, width)) for f, x in zip((self.q, self.k, self.v), views, strict=True))
        v = v * inputs["share"][..., None] * inputs["total"].sigmoid()[..., None, None]
        if "first_key" in inputs:
            return Projected({"q": q, "k": k + inputs["first_key"], "v": v}, {})
        return Projected({"q": q, "k": k, "v": v}, {}, {"first_key": k})

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        score = torch.einsum("bthk,bshk->bhts", heads["q"], heads["k"]).tril()
        if side.documents_BT is not None:
            score = score * (side.documents_BT[:, None, :, None] == side.documents_BT[:, None, None])
        return torch.einsum("bhts,bshv->bthv", score, heads["v"]), None

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2))

    @torch.no_grad()
    def after_step(self, stats) -> None:
        picks_H = stats["picks"]
        self.bias.add_(0.1 * (picks_H.mean() - picks_H).sign().to(self.bias))
'''

WIDE = '''
"""One wide ReLU-squared MLP for all layers (Pires et al., arXiv 2309.01826)."""

import dataclasses

from torch import Tensor

from models.params import Axis, Linear
from models.context import LayerContext
from models.slots import FFN, FFNConfig
from models.state import Result, Side, State


@dataclasses.dataclass(frozen=True)
class WideConfig(FFNConfig, kind="one_wide"):
    """hidden: its width."""

    hidden: int

    def build(self, ctx: LayerContext) -> FFN:
        return ctx.share("one_wide", lambda: Wide(self, ctx))


class Wide(FFN):
    def __init__(self, config: WideConfig, ctx: LayerContext) -> None:
        super().__init__()
        axis = Axis("ffn", config.hidden)
        self.up = Linear(ctx.d_model, config.hidden, axis=axis)
        self.down = Linear(config.hidden, ctx.d_model, in_axis=axis, init=ctx.output_init)

    def forward(self, x_BTD: Tensor, inputs: State, side: Side) -> Result:
        return Result(self.down(self.up(x_BTD).relu().square()))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both files in a folder of plug-ins; afterwards this process has forgotten them."""
    for slot, name, source in (("mixers", "routed_heads", ROUTED), ("ffn", "one_wide", WIDE)):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / f"{name}.py").write_text(source)
    monkeypatch.setenv("WEFT_PLUGINS", str(tmp_path))
    yield
    MixerConfig.registry.pop("routed_heads", None)
    FFNConfig.registry.pop("one_wide", None)
    for package, name in ((models.mixers, "routed_heads"), (models.ffn, "one_wide")):
        sys.modules.pop(f"{package.__name__}.{name}", None)
        path = str(tmp_path / package.__name__.rpartition(".")[2])
        if path in package.__path__:
            package.__path__.remove(path)


MESHES = [
    "tp=2",
    "tp=4",
    "cp=2,tp=2",
    "fsdp=2,tp=2",
    "fsdp=2",
    "pp=2,schedule=1f1b",
    "tp=2,pp=2,schedule=zbv",
    "hsdp=2x2",
    "fsdp=2,pp=2,schedule=dualpipev",
]


def routed(ffn: str | dict[str, object]) -> LMConfig:
    mixer = {"kind": "routed_heads", "num_heads": 4, "head_dim": 4}
    return build(mixer=mixer, ffn=ffn, values="resformer", residual="hyper")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mixer_that_uses_everything_runs_on_meshes(folder: None, mesh: str, pool: Pool) -> None:
    report = check.run(routed("moe_plus_plus"), MeshConfig.parse(mesh), pool=pool)
    assert report.ok, report.wrong


@pytest.mark.parametrize("mesh", MESHES)
def test_a_shared_ffn_runs_on_meshes(folder: None, mesh: str, pool: Pool) -> None:
    report = check.run(build(ffn={"kind": "one_wide", "hidden": 32}), MeshConfig.parse(mesh), pool=pool)
    assert report.ok, report.wrong


def test_a_shared_module_is_one_group(folder: None) -> None:
    """One set of parameters, the gradient of all uses, saved by its first layer, and kept on the stages that use it."""
    model = LM(build(ffn={"kind": "one_wide", "hidden": 32}))
    initialize(model, 0)
    depth = len(model.layers)
    name = "layers.{}.ffn.branch.ffn.up.weight"
    assert [n for n, _ in model.named_parameters() if n.endswith("ffn.up.weight")] == [name.format(0)]
    state = {key: x.clone() for key, x in model.state_dict().items()}
    assert [key for key in state if key.endswith("ffn.up.weight")] == [name.format(0)]
    other = LM(build(ffn={"kind": "one_wide", "hidden": 32}))
    other.load_state_dict(state)
    tokens = torch.arange(8)[None]
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    model.prune(depth - 1, depth)
    assert model.owners[name.format(depth - 1)] == name.format(0)
    assert name.format(depth - 1) in dict(model.named_parameters())


def test_a_mixer_is_stopped_when_it_writes_elsewhere(folder: None) -> None:
    model = LM(routed("swiglu"))
    initialize(model, 0)
    mixer = model.blocks[0].mixer.branch.mixer
    mixer.writes = ()
    model.blocks[0].mixer.branch.writes = ()
    with pytest.raises(
        ValueError,
        match=r"declares the entries .* and writes .* with its own tokens and \['first_key', 'first_value'\]",
    ):
        model(torch.arange(8)[None])

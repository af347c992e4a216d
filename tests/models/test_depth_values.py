"""Value residuals and skip-middle gates in whole models: what travels, what is learned, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.depth.base import DepthConfig
from models.depth.controllers.adaptive import AdaptiveController
from models.depth.controllers.base import penalty
from models.depth.controllers.fixed import FixedController
from models.depth.controllers.l2 import L2Controller
from models.depth.skip_middle import SkipMiddleDepth, UngatedKeysSkipMiddleDepth
from models.ffn.groups import Peers, StatsGroup
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.mixers.gated_deltanet import GatedDeltaNetConfig
from models.norms.peri import PeriNorm
from models.params import initialize
from models.slots import ValuesConfig
from models.values.resformer import LearnableResFormerValues, ResFormerValues
from parallel import check
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract import tiny

FFN = SwiGLUConfig(10)
LAYERS = {
    "A": LayerConfig(AttentionConfig(num_heads=2), FFN),
    "G": LayerConfig(GatedDeltaNetConfig(num_heads=1, num_value_heads=2, head_dim=4, expand_v=1.0), FFN),
}
VALUES: dict[str, ValuesConfig] = {"resformer": ResFormerValues(2.0, 0.7), "learnable": LearnableResFormerValues()}
DEPTHS: dict[str, DepthConfig] = {"gated keys": SkipMiddleDepth(), "ungated keys": UngatedKeysSkipMiddleDepth()}


def configure(pattern: str, **slots: Any) -> LMConfig:
    return LMConfig(16, 8, {letter: LAYERS[letter] for letter in set(pattern)}, pattern, **slots)


def build(pattern: str, scale: float = 1.0, **slots: Any) -> LM:
    model = LM(configure(pattern, **slots))
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2 * scale)
    return model.double()


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 16, (batch, length), generator=torch.Generator().manual_seed(3))


def names(model: LM) -> list[list[str]]:
    return [[entry.name for entry in boundary] for boundary in model.boundaries]


def sub(model: LM, index: int, path: str) -> Any:
    return model.get_submodule(f"layers.{index}.{path}")


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_first_value_lives_until_its_last_reader(values: ValuesConfig) -> None:
    model = build("AGA", values=values)
    assert names(model) == [["x"], ["x", "first_value"], ["x", "first_value"], ["x"]]
    entry = model.boundaries[1][1]
    assert entry.shape == (2, 4) and entry.heads == 2


def test_resformer_is_its_equation() -> None:
    model, seen = build("AGA", values=VALUES["resformer"]), []
    for index in range(3):
        values = sub(model, index, "mixer.branch.values")
        values.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    model(tokens())
    first = seen[0][0]
    assert torch.equal(seen[0][1], first)
    for own, mixed in seen[1:]:
        torch.testing.assert_close(mixed, 2.0 * first + 0.7 * own)


def test_first_value_is_not_detached() -> None:
    """Layer 0's mixer adds nothing itself, so its values are trained by what layer 1 makes of them."""
    model = build("AA", values=ResFormerValues(1.0, 0.0))
    with torch.no_grad():
        sub(model, 0, "mixer.branch.mixer.o").weight.zero_()
    loss = model(tokens(), tokens()).loss
    own, first = (sub(model, index, "mixer.branch.mixer.v").weight for index in (1, 0))
    gradients = torch.autograd.grad(loss, [own, first])
    assert not gradients[0].any() and gradients[1].any()


def test_learned_weights_start_as_the_constant_ones_and_train() -> None:
    learned, constant = LM(configure("AAA", values=VALUES["learnable"])), LM(configure("AAA", values=ResFormerValues()))
    for model in (learned, constant):
        initialize(model, seed=0)
    assert torch.equal(learned(tokens()).logits, constant(tokens()).logits)
    weights = [x for name, x in learned.named_parameters() if "lambda" in name]
    assert [x.shape for x in weights] == [(1,)] * 4
    assert all(x.any() for x in torch.autograd.grad(learned(tokens(), tokens()).loss, weights))


def test_values_of_different_shapes_are_refused() -> None:
    wide = LayerConfig(GatedDeltaNetConfig(num_heads=2, head_dim=4, expand_v=2.0), FFN)
    config = LMConfig(16, 8, {"A": LAYERS["A"], "W": wide}, "AW", values=ResFormerValues())
    with pytest.raises(ValueError, match=r"\(2 heads of width 4\).*layer 1 \(gated_deltanet\) has 2 of width 8"):
        LM(config)
    LM(LMConfig(16, 8, {"A": LAYERS["A"], "W": wide}, "AW"))


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
def test_gate_sums_live_until_their_mirror(depth: DepthConfig) -> None:
    first, second = "gate_sum.0", "gate_sum.1"
    assert names(build("AGGA", depth=depth)) == [["x"], ["x", first], ["x", first, second], ["x", first], ["x"]]


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
def test_gates_never_open_towards_the_middle_and_are_mirrored(depth: DepthConfig) -> None:
    model, gates = build("AGAAGA", depth=depth, norm=PeriNorm()), []
    for index in range(6):
        sub(model, index, "depth").register_forward_hook(lambda module, args, out: gates.append(out[0]))
    model(tokens())
    assert all(gate.dtype == torch.float64 and 0 <= gate.min() and gate.max() <= 1 for gate in gates)
    assert (gates[0] >= gates[1]).all() and (gates[1] >= gates[2]).all() and (gates[2] < gates[0]).any()
    assert all(torch.equal(gates[index], gates[5 - index]) for index in range(3))


@pytest.mark.parametrize("pattern", ["AA", "GG"])
def test_a_skipped_token_is_untouched_and_unseen(pattern: str) -> None:
    """Layer 0's gate is fitted to shut out the tokens with id 5 and no others."""
    model, hidden = build(pattern, depth=SkipMiddleDepth()), []
    ids = torch.tensor([[1, 2, 5, 3, 5, 1]])
    for layer in model.layers.values():
        layer.register_forward_hook(lambda module, args, out: hidden.append(out[0]["x"]))
    with torch.no_grad():
        before = model.embed(ids)  # type: ignore[misc]
        proj = sub(model, 0, "depth.proj")
        wanted = torch.where(ids == 5, 3.0, 0.0).double()
        proj.weight.copy_(torch.linalg.lstsq(before[0], wanted.T).solution.T)
        proj.bias.fill_(-1.0)
        model(ids)
    gone = ids == 5
    assert torch.equal(hidden[-1][gone], before[gone])
    assert not torch.isclose(hidden[-1][~gone], before[~gone]).all(-1).any()


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
def test_gates_are_trained_from_the_start(depth: DepthConfig) -> None:
    model = LM(configure("AAAA", depth=depth, norm=PeriNorm()))
    initialize(model, seed=0)
    weights = [x for name, x in model.named_parameters() if "depth" in name]
    assert [tuple(x.shape) for x in weights] == [(1, 8), (1,)] * 2
    assert all(x.any() for x in torch.autograd.grad(model(tokens(), tokens()).loss, weights))


def test_a_price_is_of_the_mean_gate_of_valid_tokens() -> None:
    ids = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, -1, -1]])
    model, gates = build("AGGA", depth=SkipMiddleDepth(FixedController(mean_coef=0.3))), []
    for index in range(4):
        sub(model, index, "depth").register_forward_hook(lambda module, args, out: gates.append(out[0]))
    targets = tokens().where(ids >= 0, -100)
    out = model(tokens(), targets, documents_BT=ids)
    expected = 0.3 * torch.stack(gates)[:, ids >= 0].sum() / 4
    torch.testing.assert_close(out.losses["gates"], expected.detach())
    torch.testing.assert_close(out.loss - out.token_loss, expected)
    torch.testing.assert_close(out.stats["layers.1.depth.gate"], gates[1][ids >= 0].sum().detach())
    assert names(model)[1:] == [
        ["x", "gate_sum.0"],
        ["x", "gate_sum.0", "gate_sum.1", "losses"],
        ["x", "gate_sum.0", "losses"],
        ["x", "losses"],
    ]


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
def test_prices_of_variances_and_norms_are_their_formulas(group: StatsGroup) -> None:
    """Against torch's own var and norm over each group, with the gradient."""
    generator = torch.Generator().manual_seed(0)
    gates_BTL = torch.rand(3, 7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    valid_BT = torch.arange(7) < torch.tensor([[7], [4], [2]])
    parts = [valid_BT] if group == "microbatch" else [valid_BT & (torch.arange(3) == row)[:, None] for row in range(3)]
    target_L = torch.tensor([0.9, 0.4, 0.4, 0.9], dtype=torch.float64)
    controllers = (
        (FixedController(0.3, -0.2, group), lambda mean_L, var_L: (0.3 * mean_L - 0.2 * var_L).mean()),
        (
            L2Controller(0.3, 0.2, group, first=0.9, middle=0.4),
            lambda mean_L, var_L: 0.3 * (mean_L - target_L).norm() + 0.2 * (var_L - target_L * (1 - target_L)).norm(),
        ),
    )
    for controller, formula in controllers:
        levels = {key: torch.full((4,), value, dtype=torch.float64) for key, value in controller.levels().items()}
        got = penalty(gates_BTL, valid_BT, controller, levels, Peers().sum)
        groups = [gates_BTL[part] for part in parts]
        shares = [len(of_group) * formula(of_group.mean(0), of_group.var(0)) for of_group in groups]
        expected = torch.stack(shares).sum()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        slopes = (torch.autograd.grad(loss, gates_BTL)[0] for loss in (got, expected))
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_a_controller_follows_the_gates_and_is_saved() -> None:
    """Targets far below the gates: the prices of all layers rise, and travel in the state dict."""
    model = build("AGGA", depth=SkipMiddleDepth(AdaptiveController(first=0.1, middle=0.0, rate=0.25)))
    out = model(tokens(), tokens())
    model.after_step(out.stats)
    state = model.state_dict()
    assert torch.equal(state["layers.1.depth.mean_coef"], torch.full((4,), 0.25))
    assert torch.equal(state["layers.1.depth.steps"], torch.ones(4))
    other = build("AGGA", depth=SkipMiddleDepth(AdaptiveController(first=0.1, middle=0.0, rate=0.25)))
    other.load_state_dict(state)
    assert other(tokens(), tokens()).losses["gates"] > out.losses["gates"] == 0


@pytest.mark.parametrize(
    ("kind", "group", "mesh"),
    [("l2", "microbatch", "fsdp=2,cp=2"), ("proportional", "sequence", "tp=2,pp=2,schedule=zbv")],
)
def test_controllers_on_a_mesh(kind: str, group: str, mesh: str, pool: Pool) -> None:
    controller = {"kind": kind, "first": 0.9, "mean_coef": 0.2, "var_coef": -0.1, "stats_group": group}
    config = tiny.build(depth={"kind": "skip_middle", "controller": controller})
    report = check.run(config, MeshConfig.parse(mesh), pool=pool, timeout=120)
    assert report.ok, report.wrong[:10]
    assert {"gates", "layers.1.depth.squares"} <= report.statistics.keys()


def test_targets_must_fit_the_layers() -> None:
    with pytest.raises(ValueError, match="targets has 1 numbers, and 4 layers share 2 gates"):
        build("AGGA", depth=SkipMiddleDepth(L2Controller(targets=(0.5,))))


def test_gate_sums_are_at_least_single_precision() -> None:
    model, seen = build("AAAA", depth=SkipMiddleDepth()).bfloat16(), {}
    sub(model, 1, "depth").register_forward_hook(lambda module, args, out: seen.update(out[1]))
    assert model(tokens()).logits.dtype == torch.bfloat16
    declared = {entry.name: entry.dtype_in(torch.bfloat16) for entry in model.boundaries[2]}
    assert seen["gate_sum.1"].dtype == declared["gate_sum.1"] == torch.float32


def test_depths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="L = 3 is odd; use 4 layers"):
        LM(configure("AAA", depth=SkipMiddleDepth()))


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
def test_a_hybrid_decodes_as_it_reads(values: ValuesConfig, depth: DepthConfig) -> None:
    """Rows of different lengths, prefilled with padding, then token by token."""
    model, ids = build("AGGA", values=values, depth=depth), tokens(2, 9)
    whole = model(ids).logits
    lengths = torch.tensor([5, 2])
    documents = torch.where(torch.arange(5) < lengths[:, None], 0, -1)
    out = model(ids[:, :5], documents_BT=documents, cache={})
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(out.logits[row, :length], whole[row, :length], rtol=1e-11, atol=1e-11)
    for step in range(4):
        at = (lengths + step)[:, None]
        out = model(ids.gather(1, at), positions_BT=at, cache=out.cache)
        expected = whole[torch.arange(2), at[:, 0]]
        torch.testing.assert_close(out.logits[:, 0], expected, rtol=1e-11, atol=1e-11)

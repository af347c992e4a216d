"""Universal depth against the equations in a plain loop, and what repeated layers have in common."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LMConfig
from models.cost import cost
from models.depth.universal_act import HaltingStep
from models.lm import LM
from models.params import Linear, initialize
from models.state import Side, Views
from tests.contract import test_contract as contract
from tests.contract.test_contract import shaken
from tests.contract.tiny import build

STEPS, LAYERS = 3, 2  # of the block
KINDS: dict[str, dict[str, float]] = {
    "universal": {"scale": 0.3},
    "universal_act": {"scale": 0.3, "eps": 0.2, "ponder_coef": 0.3},
}
TWO = {
    "A": {"mixer": {"kind": "attention", "num_heads": 2}, "ffn": {"kind": "swiglu", "hidden": 8}},
    "B": {"mixer": {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 4}, "ffn": {"kind": "swiglu", "hidden": 12}},
}
TOKENS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, -1, -1]])
POSITIONS = torch.tensor([[*range(7)], [0, 1, 2, 0, 1, 0, 1]])
TARGETS = TOKENS.where(DOCUMENTS >= 0, -100)


def config_of(kind: str, **fields: Any) -> LMConfig:
    return build(STEPS, layers=TWO, pattern="AB", depth={"kind": kind, **KINDS[kind]}, **fields)


def halting_of(model: LM) -> Linear:
    step = model.blocks[0].depth
    assert isinstance(step, HaltingStep)
    return step.halting


def bias_of(model: LM) -> Tensor:
    bias = halting_of(model).bias
    assert bias is not None
    return bias


def embedding(step: int, width: int) -> Tensor:
    """P_t of all tokens, number by number."""
    angle = [10000 ** (2 * (channel // 2) / width) for channel in range(width)]
    wave = [math.sin if channel % 2 == 0 else math.cos for channel in range(width)]
    return torch.tensor(
        [
            [[wave[c](i / angle[c]) + wave[c](step / angle[c]) for c in range(width)] for i in row]
            for row in POSITIONS.tolist()
        ],
        dtype=torch.float64,
    )


def run_block(model: LM, x_BTD: Tensor, runs_BT: Tensor) -> Tensor:
    """The first step's layers, by the parts of their branches, for the tokens that run."""
    side = Side(TOKENS, POSITIONS, DOCUMENTS)
    for layer in model.blocks[:LAYERS]:
        for sublayer in (layer.mixer, layer.ffn):
            views = sublayer.placement.before(Views.same(x_BTD))
            out_BTD = sublayer.branch(views, {}, side, side, None).out_BTD
            x_BTD = x_BTD + sublayer.placement.after(out_BTD) * runs_BT[..., None]
    return x_BTD


def reference(kind: str, model: LM) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, steps taken [B, T], output) by the equations, token by token where tokens differ."""
    assert model.embed is not None and model.embed_norm is not None and model.norm is not None
    assert model.head is not None
    x = model.embed_norm(model.embed(TOKENS))
    width, rows, columns = x.shape[-1], *TOKENS.shape
    spent = [[x.new_zeros(()) for _ in range(columns)] for _ in range(rows)]
    open_ = torch.ones_like(TOKENS, dtype=torch.bool)
    taken, ponder, out = torch.zeros_like(TOKENS), x.new_zeros(()), torch.zeros_like(x)
    settings = KINDS[kind]
    for step in range(1, STEPS + 1):
        x = x + settings["scale"] * embedding(step, width) * open_[..., None]
        if kind == "universal":
            x = out = run_block(model, x, open_)
            continue
        halting, before, open_ = halting_of(model), open_, open_.clone()
        weights = [[x.new_zeros(()) for _ in range(columns)] for _ in range(rows)]
        for b in range(rows):
            for t in range(columns):
                if not before[b, t]:
                    continue
                taken[b, t] += 1
                p = torch.sigmoid((halting.weight[0] * x[b, t]).sum() + bias_of(model)[0])
                if step == STEPS or spent[b][t] + p > 1 - settings["eps"]:
                    weights[b][t], open_[b, t] = 1 - spent[b][t], False
                    if DOCUMENTS[b, t] >= 0:
                        ponder = ponder + weights[b][t]
                else:
                    weights[b][t], spent[b][t] = p, spent[b][t] + p
        x = run_block(model, x, before)
        out = out + torch.stack([torch.stack(row) for row in weights])[..., None] * x
    logits = model.norm(out) @ model.head.weight.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    if kind == "universal_act":
        loss = loss + settings["ponder_coef"] * (ponder + taken[DOCUMENTS >= 0].sum())
    return loss, taken, logits


@pytest.mark.parametrize("norm", ["pre", "peri"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_equations(kind: str, norm: str) -> None:
    model = shaken(config_of(kind, norm=norm), seed=3)
    if kind == "universal_act":
        assert model.embed is not None
        with torch.no_grad():
            for weight, factor in ((model.embed.weight, 16), (halting_of(model).weight, 10)):
                weight.mul_(factor)  # so that tokens differ
            bias_of(model).fill_(-2)
    out = model(TOKENS, TARGETS, documents_BT=DOCUMENTS, positions_BT=POSITIONS)
    loss, taken, logits = reference(kind, model)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=0)
    mine = model(TOKENS, documents_BT=DOCUMENTS, positions_BT=POSITIONS).logits
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()))
    found = torch.autograd.grad(out.loss, list(parameters.values()))
    for name, a, b in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()), msg=name)
    if kind == "universal_act":
        assert taken.unique().tolist() == [1, 2, 3], "the case has tokens that stop at every step"
        steps = sum(value for key, value in out.stats.items() if key.endswith("depth.steps"))
        assert steps == taken[DOCUMENTS >= 0].sum()
        assert out.losses["ponder"] > 0


def test_the_block_is_there_once() -> None:
    """In parameters, FLOPs and saved tensors, and after a step of an optimiser."""
    config = config_of("universal_act")
    model, once = LM(config), LM(build(1, layers=TWO, pattern="AB"))
    assert once.head is not None
    halting = config.d_model + 1
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in once.parameters()) + halting
    assert {name for name in model.state_dict() if ".depth." not in name} == set(once.state_dict())
    through = cost(config, 16).active - once.head.weight.numel() - (STEPS - 1) * config.d_model
    assert through == STEPS * (cost(once.config, 16).active - once.head.weight.numel())
    initialize(model, 0)
    model(TOKENS, TOKENS).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for index in range(LAYERS, LAYERS * STEPS):
        for own, first in zip(
            model.blocks[index].mixer.parameters(), model.blocks[index % LAYERS].mixer.parameters(), strict=True
        ):
            assert own is first


def test_a_stopped_token_is_copied_on() -> None:
    """Nothing that happens to its stream later: with p above 1 - eps at once, the model is its first step alone."""
    model = shaken(config_of("universal_act"))
    with torch.no_grad():
        halting_of(model).weight.zero_()
        bias_of(model).fill_(4.0)
    streams = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: streams.append(out[0]["x"])) for layer in model.blocks[1:]
    ]
    out = model(TOKENS, TOKENS)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(stream, streams[0]) for stream in streams[1:])
    assert sum(value for key, value in out.stats.items() if key.endswith("depth.steps")) == TOKENS.numel()
    with torch.no_grad():
        assert torch.equal(model(TOKENS, TOKENS).loss, out.loss)


def test_between_layers_all_is_their_own() -> None:
    """Connections and values differ from layer to layer, whatever the block shares; experts link within a step."""
    experts = {"kind": "moe_plus_plus", "num_experts": 4, "hidden": 8}
    layers = {letter: {**layer, "ffn": experts} for letter, layer in TWO.items()}
    config = build(2, layers=layers, pattern="AB", depth="universal", residual="mudd", values="resformer_learnable")
    model = LM(config)
    first, third = model.blocks[0], model.blocks[2]
    assert first.mixer.branch.mixer is third.mixer.branch.mixer and first.ffn.branch.ffn is third.ffn.branch.ffn
    assert len(third.mixer.connection.reads) == 3 and len(first.mixer.connection.reads) == 1
    assert third.mixer.branch.values.reads and not first.mixer.branch.values.reads
    assert [bool(layer.ffn.branch.reads) for layer in model.blocks] == [False, True, False, True]


def test_biases_move_once_by_the_loads_of_all_steps() -> None:
    """On a stage that holds a copy of the router too."""
    experts = {
        "kind": "moe",
        "num_experts": 3,
        "hidden": 8,
        "router": {"kind": "deepseek_v3", "top_k": 2, "balance_rate": 0.5},
    }
    whole, stage = (LM(build(3, ffn=experts, depth="universal")) for _ in range(2))
    stage.prune(2, 3)
    # Step by step the biases would move three times, and another way.
    loads = {"layers.0": [9.0, 0.0, 0.0], "layers.1": [0.0, 2.0, 1.0], "layers.2": [0.0, 2.0, 1.0]}
    stats = {f"{place}.ffn.expert_load": torch.tensor(load) for place, load in loads.items()}
    for model in (whole, stage):
        initialize(model, 0)
        model.after_step(stats)
        bias = next(value for name, value in model.blocks[-1].named_buffers() if name.endswith("bias"))
        assert bias.tolist() == [-0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 1}, "write the block as pattern"),
        ({"num_layers": 4, "depth": {"kind": "universal", "block": 3}}, "use 1 or 2, or null"),
        ({"num_layers": 4, "depth": {"kind": "universal", "scale": -1}}, "scale"),
        ({"num_layers": 4, "depth": {"kind": "universal_act", "eps": 1.0}}, "eps is 1.0"),
        ({"num_layers": 4, "depth": {"kind": "universal_act", "ponder_coef": -1.0}}, "ponder_coef is -1.0"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LM(build(**{"depth": "universal", **fields}))


def test_every_norm_is_used_where_only_the_first_step_makes_values() -> None:
    """MUDD norms the inputs of queries, keys and values apart, and the last of them is read once."""
    depth = {"kind": "universal", "scale": 0.1}
    contract.test_shapes_gradients_and_dtype(build(mixer="retention", residual="mudd", values="svformer", depth=depth))

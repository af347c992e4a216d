"""What routers draw in training, and whom an expert with limited room serves, against a loop over tokens.

Draws are given in float64, so that everything agrees to rounding. Formulas: Shazeer et al. 2017 (1701.06538), sections
4 and A; Riquelme et al. 2021 (2106.05974), section 2 and A; Lepikhin et al. 2020 (2006.16668), algorithm 1; Fedus et
al. 2021 (2101.03961), section 2.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.ffn.moe import MoE, MoEConfig
from models.ffn.routing import RouterConfig
from models.routers import gshard, noisy_top_k, switch
from models.routers.gshard import GShardConfig
from models.routers.mixtral import MixtralConfig
from models.routers.noisy_top_k import NoisyTopKConfig
from models.routers.switch import SwitchConfig
from models.routers.v_moe import VMoEConfig
from models.state import Side
from tests.models.test_moe import inputs, make, swiglu

ROWS, LENGTH, WIDTH, EXPERTS = 2, 6, 5, 4
CAPACITY = 0.7
VALID = [[True] * LENGTH, [True] * (LENGTH - 2) + [False] * 2]
WHERE = [(b, t) for b in range(ROWS) for t in range(LENGTH)]
ROUTERS: dict[str, RouterConfig] = {
    "mixtral": MixtralConfig(aux_coef=0.3, z_coef=0.2),
    "switch": SwitchConfig(aux_coef=0.3, z_coef=0.2, jitter=0.4),
    "gshard": GShardConfig(aux_coef=0.3, z_coef=0.2),
    "noisy_top_k": NoisyTopKConfig(top_k=2, importance_coef=0.3, load_coef=0.4, z_coef=0.2),
    "v_moe": VMoEConfig(top_k=2, importance_coef=0.3, load_coef=0.4, z_coef=0.2),
}
At = tuple[int, int]


@dataclasses.dataclass
class Token:
    """What one token asks for. amounts, chances: of each expert, for importance and for load."""

    logits: list[Tensor]
    probs: list[Tensor]
    picks: list[int]
    weights: list[Tensor]
    asks: list[bool]
    amounts: list[Tensor] | None = None
    chances: list[Tensor] | None = None


def softmax(logits: list[Tensor]) -> list[Tensor]:
    exps = [torch.exp(logit) for logit in logits]
    return [value / sum(exps) for value in exps]


def largest(values: list[Tensor], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:count]


def below(z: Tensor) -> Tensor:
    """P(N(0, 1) < z)."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def ask(module: MoE, x: Tensor, draws: Tensor) -> Token:
    weight, kind = module.router.weight, module.config.router.kind
    seen = x * (1 + 0.4 * (2 * draws - 1)) if kind == "switch" else x
    logits = [(weight[e] * seen).sum() for e in range(EXPERTS)]
    probs = softmax(logits)
    if kind == "mixtral":
        picks = largest(logits, 2)
        return Token(logits, probs, picks, softmax([logits[e] for e in picks]), [True, True])
    if kind == "switch":
        picks = largest(probs, 1)
        return Token(logits, probs, picks, [probs[picks[0]]], [True])
    if kind == "gshard":
        first, second = largest(probs, 2)
        weights = [probs[e] / (probs[first] + probs[second]) for e in (first, second)]
        return Token(logits, probs, [first, second], weights, [True, bool(draws[0] < 2 * weights[1])])
    if kind == "noisy_top_k":
        noise_weight = module.router.get_parameter("noise_weight")
        deviations = [torch.log(1 + torch.exp((noise_weight[e] * x).sum())) for e in range(EXPERTS)]
        noisy = [logits[e] + draws[e] * deviations[e] for e in range(EXPERTS)]
        picks = largest(noisy, 2)
        weights = softmax([noisy[e] for e in picks])
        amounts = [weights[picks.index(e)] if e in picks else x.new_zeros(()) for e in range(EXPERTS)]
        chances = []
        for e in range(EXPERTS):
            others = [noisy[i] for i in range(EXPERTS) if i != e]
            chances.append(below((logits[e] - others[largest(others, 2)[-1]]) / deviations[e]))
        return Token(noisy, softmax(noisy), picks, weights, [True, True], amounts, chances)
    assert kind == "v_moe"
    noisy = [logits[e] + draws[e] / EXPERTS for e in range(EXPERTS)]
    gates, picks = softmax(noisy), largest(noisy, 2)
    chances = [1 - below((noisy[picks[-1]] - logits[e]) * EXPERTS) for e in range(EXPERTS)]
    return Token(noisy, gates, picks, [gates[e] for e in picks], [True, True], probs, chances)


def served(kind: str, tokens: dict[At, Token], group: list[At]) -> set[tuple[At, int]]:
    """(token, pick) that find room, one after the other."""
    asking = [(at, k) for at in group for k in range(len(tokens[at].picks)) if tokens[at].asks[k]]
    if kind == "gshard":
        asking.sort(key=lambda pick: pick[1])
    if kind == "v_moe":
        asking.sort(key=lambda pick: (pick[1], -max(w.item() for w in tokens[pick[0]].weights)))
    per_token = len(tokens[group[0]].picks)
    left = [max(1, math.floor(CAPACITY * per_token * len(group) / EXPERTS))] * EXPERTS
    found = set()
    for at, k in asking:
        expert = tokens[at].picks[k]
        if left[expert]:
            left[expert] -= 1
            found.add((at, k))
    return found


def coefficient(sums: list[Tensor]) -> Tensor:
    """The squared coefficient of variation."""
    mean = sum(sums, torch.zeros(())) / len(sums)
    return sum((value - mean) ** 2 for value in sums) / len(sums) / mean**2


def losses(kind: str, tokens: dict[At, Token], group: list[At]) -> Tensor:
    """Of one group, times its tokens."""
    total = sum((0.2 * torch.stack(tokens[at].logits).exp().sum().log() ** 2 for at in group), torch.zeros(()))
    if kind in ("noisy_top_k", "v_moe"):
        importance = [sum(tokens[at].amounts[e] for at in group) for e in range(EXPERTS)]  # type: ignore[index]
        load = [sum(tokens[at].chances[e] for at in group) for e in range(EXPERTS)]  # type: ignore[index]
        return total + len(group) * (0.3 * coefficient(importance) + 0.4 * coefficient(load))  # type: ignore[arg-type]
    for e in range(EXPERTS):
        picked = [tokens[at].picks[:1] if kind == "gshard" else tokens[at].picks for at in group]
        f = sum(e in picks for picks in picked) / len(group)
        total = total + 0.3 * EXPERTS * f * sum(tokens[at].probs[e] for at in group)
    return total


def drawn(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn if kind in ("noisy_top_k", "v_moe") else torch.rand
    width = {"gshard": 1, "switch": WIDTH}.get(kind, EXPERTS)
    return draw(ROWS, LENGTH, width, generator=generator, dtype=torch.float64)


def in_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Puts numbers in the place of the router's draws, and returns them."""
    draws = drawn(kind)

    def give(side: Side, role: str, width: int) -> Tensor:
        assert side.draws and width == draws.shape[-1]
        return draws

    monkeypatch.setattr(noisy_top_k, "normal", give)
    monkeypatch.setattr(gshard, "uniform", give)
    monkeypatch.setattr(switch, "uniform", give)
    return draws


def training_side() -> Side:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    return Side(ids, ids, torch.tensor(VALID).long() - 1, keys=torch.arange(ROWS))


@pytest.mark.parametrize("room", ["dropless", "sequence", "microbatch"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_training_equals_a_loop_over_tokens(kind: str, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {} if room == "dropless" else {"capacity_factor": CAPACITY, "capacity_group": room}
    one = room == "microbatch"
    router = dataclasses.replace(ROUTERS[kind], stats_group="microbatch" if one else "sequence")
    module = make(MoEConfig(EXPERTS, 3, router, **fields), WIDTH)
    draws, x = in_training(kind, monkeypatch), inputs((ROWS, LENGTH, WIDTH))
    result = module(x, {}, training_side())

    tokens = {(b, t): ask(module, x[b, t], draws[b, t]) for b, t in WHERE}
    valid = [at for at in WHERE if VALID[at[0]][at[1]]]
    groups = [valid] if one else [[at for at in valid if at[0] == b] for b in range(ROWS)]
    asked = {(at, k) for at in valid for k, asks in enumerate(tokens[at].asks) if asks}
    kept = asked if room == "dropless" else set().union(*(served(kind, tokens, group) for group in groups))
    loss = sum((losses(kind, tokens, group) for group in groups), x.new_zeros(()))
    out = x.new_zeros(x.shape)
    experts = module.experts
    for b, t in valid:
        for k, e in enumerate(tokens[b, t].picks):
            if ((b, t), k) in kept:
                y = swiglu(x[b, t], experts.gate[e], experts.up[e], experts.down[e])
                out = out.index_put((torch.tensor(b), torch.tensor(t)), tokens[b, t].weights[k] * y, accumulate=True)
    counted = [tokens[at].picks[k] for at, k in asked]
    assert result.stats["expert_load"].tolist() == [counted.count(e) for e in range(EXPERTS)]
    if room != "dropless":
        late = [tokens[at].picks[k] for at, k in asked - kept]
        assert result.stats["expert_dropped"].tolist() == [late.count(e) for e in range(EXPERTS)]
        assert 2 < len(kept) < len(asked) - 2, "there is something to serve and something to drop"
        earlier = set().union(*(served("", tokens, group) for group in groups))
        assert (kept != earlier) == (kind in ("gshard", "v_moe")), "who comes first matters"

    total = torch.stack(list(result.losses.values())).sum()
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
    shown = torch.tensor(VALID)[..., None]
    torch.testing.assert_close(result.out_BTD * shown, out, rtol=1e-12, atol=1e-12)
    leaves, cotangent = [x, *module.parameters()], inputs(x.shape, seed=2).detach() * shown
    got = torch.autograd.grad((result.out_BTD * cotangent).sum() + total, leaves)
    expected = torch.autograd.grad((out * cotangent).sum() + loss, leaves)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


def test_gshard_leaves_out_some_second_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And, without the draw, none."""
    draws, x = in_training("gshard", monkeypatch), inputs((ROWS, LENGTH, WIDTH))
    module = make(MoEConfig(EXPERTS, 3, GShardConfig()), WIDTH)
    keep_BTK = module.router(x, training_side()).routing.keep_BTK
    assert keep_BTK is not None and keep_BTK[..., 0].all()
    assert 0 < keep_BTK[..., 1].sum() < draws.numel()
    module.router.random_second = False  # type: ignore[assignment]
    assert module.router(x, training_side()).routing.keep_BTK is None


@pytest.mark.parametrize("kind", ROUTERS)
def test_nothing_is_drawn_or_dropped_in_evaluation(kind: str) -> None:
    x, side = inputs((ROWS, LENGTH, WIDTH)), dataclasses.replace(training_side(), keys=None)
    modules = [make(MoEConfig(EXPERTS, 3, ROUTERS[kind], capacity_factor=c), WIDTH) for c in (None, CAPACITY)]
    dropless, limited = (module(x, {}, side).out_BTD for module in modules)
    assert torch.equal(dropless, limited) and (dropless != 0).any(-1).all()

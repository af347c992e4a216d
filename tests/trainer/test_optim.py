"""Optimisers: AdamW and Muon against torch's own, parameter groups, and how their work is dealt out."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.validate import parse
from models.lm import LM
from models.params import Axis, Normal, ParamSpec, Parts, named_specs
from parallel.deal import deal
from parallel.engine import Engine
from parallel.mesh import Mesh
from tests.contract.tiny import HYBRID, build
from trainer.optim.base import OptimConfig
from trainer.optim.groups import refuse_patterns, settings
from trainer.optim.muon import Muon, MuonConfig
from trainer.optim.newton_schulz import COEFFICIENTS, orthogonalized

GROUPS = [
    {"match": "layers.0.*", "lr_scale": 0.5},
    {"match": "router", "weight_decay": 0.3},
    {"match": "embedding", "lr_scale": 2.0, "weight_decay": 0.0},
    {"match": "*norm*.weight", "lr_scale": 0.0},
]


def optim(**fields: Any) -> OptimConfig:
    return parse(OptimConfig, {"lr": 0.02, **fields})


def stepped(config: OptimConfig, steps: int = 3, **model: Any) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """(parameters after some steps on made-up gradients, those gradients), by name, float64."""
    engine = Engine(build(num_layers=2, **model), Mesh.single(), seed=0, dtype=torch.float64)
    optimizer, generator = config.build(engine), torch.Generator().manual_seed(1)
    used: dict[str, list[Tensor]] = {held.shard.name: [] for held in engine.held()}
    for _ in range(steps):
        for held in engine.held():
            grad = torch.randn(held.parameter.shape, generator=generator, dtype=torch.float64)
            held.parameter.grad = grad
            used[held.shard.name].append(grad)
        optimizer.step(config.lr)
    return {held.shard.name: held.parameter.detach() for held in engine.held()}, used


def by_torch(name: str, make: Any, gradients: list[Tensor], **model: Any) -> Tensor:
    """The same parameter under an optimiser of torch."""
    engine = Engine(build(num_layers=2, **model), Mesh.single(), seed=0, dtype=torch.float64)
    parameter = next(held.parameter for held in engine.held() if held.shard.name == name)
    optimizer = make([parameter])
    for grad in gradients:
        parameter.grad = grad
        optimizer.step()
    return parameter.detach()


def test_sgd_is_torchs() -> None:
    """Without weight decay, which is decoupled here and is not in torch's."""
    after, gradients = stepped(optim(kind="sgd", momentum=0.8, weight_decay=0.0))
    for name, value in after.items():
        make = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.8)
        torch.testing.assert_close(value, by_torch(name, make, gradients[name]), rtol=1e-12, atol=1e-14)


def test_adamw_is_torchs() -> None:
    after, gradients = stepped(optim(kind="adamw", betas=[0.8, 0.99], eps=1e-6, weight_decay=0.2))
    for name, value in after.items():
        decay = 0.0 if "norm" in name else 0.2
        make = functools.partial(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
        torch.testing.assert_close(value, by_torch(name, make, gradients[name]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_torchs(adjust: str, nesterov: bool) -> None:
    """On matrices, up to the bfloat16 in which torch orthogonalises; everything else is AdamW's to the last bit."""
    config = optim(kind="muon", adjust_lr=adjust, nesterov=nesterov, momentum=0.9)
    after, gradients = stepped(config)
    adamw, _ = stepped(optim(kind="adamw"))
    muon = functools.partial(
        torch.optim.Muon, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust
    )
    specs = {name: spec for name, _, _, spec in named_specs(LM(build(num_layers=2)))}
    assert {spec.role for spec in specs.values()} == {"embedding", "head", "matrix", "vector"}
    for name, value in after.items():
        if specs[name].role != "matrix":
            assert torch.equal(value, adamw[name]), name
            continue
        rows, columns = specs[name].shape
        rms = 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
        # Five iterations of three products, whose elements have errors of 2^-9 of about 1 / sqrt(columns), 3 steps.
        bound = 3 * 0.02 * rms * 15 * 2**-9
        error = (value - by_torch(name, muon, gradients[name])).abs().max()
        assert error < bound, (name, error, bound)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 7)])
def test_orthogonalised_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    x_SMN = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = orthogonalized(x_SMN, steps=5)
    u, s, vh = torch.linalg.svd(x_SMN, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(out, u @ s.diag_embed() @ vh, rtol=0, atol=1e-11)
    assert torch.equal(orthogonalized(torch.zeros(2, *shape), 5), torch.zeros(2, *shape))


def test_an_update_has_the_size_that_is_asked_for() -> None:
    """match_rms_adamw: the root mean square is rms times that of the singular values, 0.7 to 1.2, times lr."""
    config = optim(kind="muon", weight_decay=0.0, rms=0.4)
    after, _ = stepped(config, steps=1)
    before = Engine(build(num_layers=2), Mesh.single(), seed=0, dtype=torch.float64).full_state()
    name = "layers.0.ffn.branch.ffn.gate.weight"
    size = (after[name] - before[name]).square().mean().sqrt() / (0.02 * 0.4)
    assert 0.68 < size < 1.21


def muon_of(spec: ParamSpec, monkeypatch: pytest.MonkeyPatch) -> Muon:
    monkeypatch.setattr("trainer.optim.base.settings", lambda *_: {})
    engine: Any = type("Engine", (), {"config": None})()
    return Muon(engine, MuonConfig(lr=1.0))


def test_experts_and_fused_projections_are_matrices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = ParamSpec((3, 4, 6), (Axis("experts", 3), None, None), Normal(1.0), True)
    fused = ParamSpec((10, 6), (Parts((4, 6), (Axis("ffn", 4), None)), None), Normal(1.0), True)
    x_SMN = torch.randn(3, 4, 6, dtype=torch.float64)
    x_MN = torch.randn(10, 6, dtype=torch.float64)
    muon = muon_of(stack, monkeypatch)
    alone = [orthogonalized(x[None], 5)[0] for x in x_SMN]
    torch.testing.assert_close(muon.orthogonal(x_SMN, stack), torch.stack(alone), rtol=0, atol=1e-12)
    parts = [orthogonalized(x[None], 5)[0] for x in x_MN.split([4, 6])]
    torch.testing.assert_close(muon.orthogonal(x_MN, fused), torch.cat(parts), rtol=0, atol=1e-12)


def test_roles() -> None:
    model = LM(build(**HYBRID, residual="hyper", depth="skip_middle"))
    roles = {name: spec.role for name, _, _, spec in named_specs(model)}
    assert roles["embed.weight"] == "embedding" and roles["head.weight"] == "head"
    for part, role in (
        ("ffn.branch.ffn.router.weight", "router"),
        ("ffn.branch.ffn.experts.up", "matrix"),
        ("mixer.branch.mixer.q.weight", "matrix"),
        ("mixer.branch.mixer.beta.weight", "gate"),
        ("mixer.branch.mixer.conv_q", "vector"),
        ("mixer.branch.mixer.A_log", "vector"),
        ("mixer.connection.dynamic_alpha", "gate"),
        ("mixer.connection.static_alpha", "vector"),
        ("depth.proj.weight", "gate"),
    ):
        assert roles[f"layers.0.{part}"] == role, part
    assert not any(role == "matrix" for name, role in roles.items() if "norm" in name or name.endswith("bias"))


def test_the_first_group_that_matches_counts() -> None:
    config = optim(kind="adamw", weight_decay=0.1, groups=GROUPS)
    found = settings(build(**HYBRID), config.groups, config.weight_decay)
    for name, expected in {
        "embed.weight": (2.0, 0.0),
        "head.weight": (1.0, 0.1),
        "layers.0.ffn.branch.ffn.router.weight": (0.5, 0.1),
        "layers.1.ffn.branch.ffn.router.weight": (1.0, 0.3),
        "norm.weight": (0.0, 0.0),
        "layers.1.mixer.branch.mixer.A_log": (1.0, 0.0),
    }.items():
        assert (found[name].lr_scale, found[name].weight_decay) == expected, name


def test_groups_change_the_step() -> None:
    groups = [{"match": "head", "lr_scale": 0.0}, {"match": "matrix", "lr_scale": 0.25}]
    before = Engine(build(num_layers=2), Mesh.single(), seed=0, dtype=torch.float64).full_state()
    for kind in OptimConfig.kinds():
        plain_step, _ = stepped(optim(kind=kind), steps=1)
        grouped, _ = stepped(optim(kind=kind, groups=groups), steps=1)
        assert torch.equal(grouped["head.weight"], before["head.weight"])
        assert torch.equal(grouped["embed.weight"], plain_step["embed.weight"])
        name = "layers.1.mixer.branch.mixer.q.weight"
        moved = (grouped[name] - before[name]) / (plain_step[name] - before[name])
        torch.testing.assert_close(moved, torch.full_like(moved, 0.25), rtol=1e-9, atol=0)


def test_muon_leaves_to_adamw_what_it_is_told_to() -> None:
    excluded, _ = stepped(optim(kind="muon", exclude=["*.q.weight"]), steps=2)
    adamw, _ = stepped(optim(kind="adamw"), steps=2)
    for name in excluded:
        assert torch.equal(excluded[name], adamw[name]) == (
            ".q.weight" in name or "layers" not in name or "norm" in name
        )


ROLES = "its roles are embedding, head, matrix, vector, and a name is like embed.weight"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"groups": [{"match": "routr"}]}, "optim.groups.0.match is 'routr', which no parameter of the model is "),
        ({"groups": [{"match": "*"}, {"match": "gate"}]}, "optim.groups.1.match is 'gate', which no parameter"),
        ({"kind": "muon", "exclude": ["embeding"]}, f"optim.exclude.0 is 'embeding', which no parameter of the model "
         f"is called; did you mean embedding? {ROLES}"),
    ],
)  # fmt: skip
def test_patterns_that_mean_nothing_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        refuse_patterns(build(), optim(**{"kind": "adamw", **fields}).patterns())
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must lie in"),
        ({"ns_steps": 0}, "ns_steps is 0; it must lie between 1 and 99"),
        ({"rms": 0}, "rms is 0.0; it must be above 0"),
        ({"betas": [0.9, 1]}, "betas is [0.9, 1.0]; both must lie in"),
        ({"groups": [{"match": "head", "weight_decay": -1}]}, "weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        optim(kind="muon", **fields)
    assert sentence in str(error.value)


def test_work_is_dealt_out_evenly() -> None:
    specs = [ParamSpec((size, size), (None, None), Normal(1.0), True) for size in (4, 4, 4, 4, 8, 2)]
    owners = deal([*specs, None], 2)
    assert owners[-1] is None
    assert owners[4] != owners[0] == owners[1] == owners[2] == owners[3], "8^3 is more than four times 4^3"
    assert set(deal(list(specs[:4]), 4)) == {0, 1, 2, 3}

"""What every residual topology promises, and what single ones do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.layer import Layer
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.params import initialize, named_specs
from models.residual.fixed_point import check_bits, on_grid
from models.residual.hyper import HyperConnections
from models.residual.hyper_fractional import FractionalHyperConnections
from models.residual.ladder import LadderResidual
from models.residual.mudd import MUDDConnections
from models.residual.plain import PlainResidual
from models.residual.reversible import Reversible, ReversibleResidual
from models.scaling.rezero import ReZero
from models.shortcuts.laurel import Laurel
from models.slots import Connection, ResidualConfig
from models.state import Entry, Side, State
from tests.connections import apply, causal_mean, context

VARIANTS: dict[str, ResidualConfig] = {
    **{name: kind() for name, kind in ResidualConfig.kinds().items()},  # type: ignore[dict-item]
    "hyper-1": HyperConnections(streams=1),
    "hyper-rms": HyperConnections(streams=2, norm="rms", activation="identity"),
    "hyper_fractional-3x2": FractionalHyperConnections(fractions=2, streams=3),
    "ladder-hybrid": LadderResidual(layers=(1,)),
    "mudd-released": MUDDConnections(separate_norms=False, hidden_round=64, expand_last=4),
    "reversible-grid": ReversibleResidual(grid_bits=44),
}
every_kind = pytest.mark.parametrize("residual", VARIANTS.values(), ids=VARIANTS)


def build(residual: ResidualConfig, seed: int = 0, **slots: Any) -> LM:
    # The eps is negligible: several streams end as a multiple of one, from which an eps would tell them.
    layer = LayerConfig(AttentionConfig(num_heads=2), SwiGLUConfig(hidden=12))
    model = LM(LMConfig(16, 8, {"A": layer}, "AAA", residual=residual, norm=PreNorm(1e-30), **slots)).double()
    initialize(model, seed)
    return model


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Make every parameter matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def tokens() -> Tensor:
    return torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(1))


def connections(model: LM) -> list[tuple[Connection, State]]:
    """Every connection, with random values of the entries that it says it reads."""
    assert model.opener is not None
    generator = torch.Generator().manual_seed(2)
    known: dict[str, Entry] = {entry.name: entry for entry in model.opener.writes}
    found = []
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        for sublayer in (layer.mixer, layer.ffn):
            shapes = {name: (2, 6, *known[name].shape) for name in sublayer.connection.reads}
            state = {
                name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                for name, shape in shapes.items()
            }
            found.append((sublayer.connection, state))
            known |= {entry.name: entry for entry in sublayer.connection.writes}
    return found


def branch_output() -> Tensor:
    return torch.linspace(-1, 1, 2 * 6 * 8, dtype=torch.float64).view(2, 6, 8)


@pytest.mark.parametrize("name", [name for name, residual in VARIANTS.items() if residual.starts_plain])
def test_starts_as_the_plain_residual_where_it_says_so(name: str) -> None:
    residual = VARIANTS[name]
    plain, model = build(PlainResidual()), build(residual)
    perturb(plain)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    # Norms that the plain model does not have are those of the separate query, key and value inputs.
    for key in missing:
        if ".placement.norms." in key:
            owner, _, _ = key.partition(".placement.norms.")
            model.get_parameter(key).data.copy_(plain.get_parameter(f"{owner}.placement.norms.0.weight"))
        else:
            assert ".connection." in key or key.startswith("closer.")
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-12, atol=1e-12)


@every_kind
def test_state_between_layers_is_what_is_declared_and_never_changed(residual: ResidualConfig) -> None:
    model = build(residual)
    perturb(model)
    assert model.embed is not None and model.embed_norm is not None and model.opener is not None
    side = Side(tokens(), torch.arange(6).expand(2, 6))
    state = model.opener(model.embed_norm(model.embed(side.tokens)))
    held: list[tuple[Tensor, int]] = []
    for layer, boundary in zip([*model.layers.values(), None], model.boundaries, strict=True):
        assert {entry.name: (2, 6, *entry.shape) for entry in boundary} == {k: tuple(x.shape) for k, x in state.items()}
        assert all(state[entry.name].dtype == (entry.dtype or torch.float64) for entry in boundary)
        held += [(x, x._version) for x in state.values()]
        if layer is not None:
            state, _ = layer(state, side, side)
    assert all(x._version == version for x, version in held)


@every_kind
def test_connections_touch_what_they_declare(residual: ResidualConfig) -> None:
    model = build(residual)
    perturb(model)
    for index, (connection, state) in enumerate(connections(model)):
        other = torch.zeros(2, 6)
        views, kept = connection.read({**state, "other": other})
        written = connection.write({**state, "other": other}, kept, branch_output())
        assert written["other"] is other
        changed = {name for name, x in written.items() if name != "other" and x is not state.get(name)}
        assert changed <= {entry.name for entry in connection.writes} <= written.keys()
        for entry in connection.writes:
            assert written[entry.name].shape == (2, 6, *entry.shape)
        seen = [x for x in (*views, *(written[entry.name] for entry in connection.writes)) if x.requires_grad]
        gradients = torch.autograd.grad([x.sum() for x in seen], list(state.values()), allow_unused=True)
        assert all(gradient is not None for gradient in gradients)
        if index % 2 == 0:  # only a layer's first connection is asked for a view
            assert connection.peek(state).shape == (2, 6, 8)


@every_kind
def test_connections_are_token_wise(residual: ResidualConfig) -> None:
    model = build(residual)
    perturb(model)
    for connection, state in connections(model):
        cut = (slice(1, 2), slice(2, 5))
        views, kept = connection.read(state)
        part = {name: x[cut] for name, x in state.items()}
        part_views, part_kept = connection.read(part)
        for view, part_view in zip(views, part_views, strict=True):
            torch.testing.assert_close(part_view, view[cut], rtol=1e-12, atol=1e-12)
        whole = connection.write(state, kept, branch_output())
        for name, x in connection.write(part, part_kept, branch_output()[cut]).items():
            torch.testing.assert_close(x, whole[name][cut], rtol=1e-12, atol=1e-12)


@every_kind
def test_every_parameter_learns_and_is_saved(residual: ResidualConfig) -> None:
    model, copy = build(residual), build(residual, seed=1)
    perturb(model)
    model(tokens(), tokens()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(tokens()).logits, model(tokens()).logits)


def test_hyper_connections_decay_only_what_depends_on_the_token() -> None:
    decayed = {
        name.rpartition(".")[2]: spec.decay
        for name, _, _, spec in named_specs(build(HyperConnections()))
        if ".connection." in name
    }
    assert decayed == {
        "static_alpha": False,
        "static_beta": False,
        "alpha_scale": False,
        "beta_scale": False,
        "dynamic_alpha": True,
        "dynamic_beta": True,
        "weight": False,
        "bias": False,
    }


@pytest.mark.parametrize("layers", [None, (), (0,), (1, 2), (0, 2)])
def test_ladder_reads_the_stream_without_the_newest_output(layers: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    kind = LadderResidual(layers)
    state, before = kind.open(4)(stream), stream
    for k, weight in enumerate(weights):
        on_ladder = layers is None or k // 2 in layers

        def branch(u: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(u @ weight)

        before, stream = stream, stream + branch(before if on_ladder else stream)
        connection = kind.connect(context(4, k // 2, 3), "ffn" if k % 2 else "mixer", nn.Identity())
        state = apply(connection, {}, state, branch)
        assert state.keys() == {entry.name for entry in connection.writes}
    torch.testing.assert_close(kind.close(4, 3)(state), stream, rtol=1e-13, atol=1e-13)


def test_ordinary_layers_of_a_hybrid_ladder_send_one_stream() -> None:
    boundaries = build(LadderResidual(layers=(1,))).boundaries
    assert [[entry.name for entry in boundary] for boundary in boundaries] == [["x"], ["x", "pending"], ["x"], ["x"]]


def test_mudd_keeps_every_output_and_nothing_else() -> None:
    names = [[entry.name for entry in boundary] for boundary in build(MUDDConnections()).boundaries]
    assert names == [[f"past.{j}" for j in range(depth + 1)] for depth in range(4)]


def test_mudd_rounds_a_multiple_up_as_the_released_models_do() -> None:
    config = MUDDConnections(hidden_round=64, expand_last=4)
    assert [config.hidden(4, 3), config.hidden(4, 16), config.hidden(1, 16)] == [64, 128, 128]


def test_reversible_streams_on_a_grid_are_restored_bit_for_bit() -> None:
    depth, width = 48, 16
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(depth, 2, width, width, generator=generator) / width**0.5
    kind = ReversibleResidual(grid_bits=14)

    def branches(index: int):
        yield "mixer", lambda u: torch.tanh(causal_mean(u) @ weights[index, 0])
        yield "ffn", lambda u: torch.tanh(u @ weights[index, 1])

    steps = [
        (kind.connect(context(width, index, depth), name, nn.Identity()), branch)
        for index in range(depth)
        for name, branch in branches(index)
    ]
    first = state = kind.open(width)(torch.randn(2, 8, width, generator=generator))
    for connection, branch in steps:
        state = apply(connection, {}, state, branch)
    assert state["x1"].abs().max() > first["x1"].abs().max()
    for connection, branch in reversed(steps):
        assert isinstance(connection, Reversible)
        state = connection.undo(state, branch(connection.read(state)[0].q_BTD))
    assert torch.equal(state["x1"], first["x1"]) and torch.equal(state["x2"], first["x2"])


def test_grid_rounds_exactly_and_passes_gradients_straight() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = on_grid(x, 14)
    assert torch.equal(y * 2**14, torch.round(x * 2**14))
    (gradient,) = torch.autograd.grad((y * x.detach()).sum(), x)
    assert torch.equal(gradient, x.detach())


def test_grid_needs_digits() -> None:
    check_bits(14, torch.float32)
    with pytest.raises(ValueError, match="grid_bits is 14 and the stream is torch"):
        check_bits(14, torch.bfloat16)


def test_shortcuts_need_one_identity_path() -> None:
    with pytest.raises(ValueError, match="shortcut laurel acts on one identity path, which residual hyper does not"):
        build(HyperConnections(), shortcut=Laurel(2))


@pytest.mark.parametrize("residual", [PlainResidual(), LadderResidual()], ids=["plain", "ladder"])
def test_laurel_and_rezero_start_as_the_identity_and_learn(residual: ResidualConfig) -> None:
    model = build(residual, shortcut=Laurel(2), scaling=ReZero())
    assert model.embed is not None and model.norm is not None and model.head is not None
    identity = model.head.logits(model.norm(model.embed(tokens())))
    assert torch.equal(model(tokens()).logits, identity)
    perturb(model)
    model(tokens(), tokens()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HyperConnections(streams=0), "streams is 0"),
        (lambda: FractionalHyperConnections(fractions=0), "fractions is 0"),
        (lambda: build(FractionalHyperConnections(fractions=3)), "d_model 8 is not a multiple of fractions 3"),
        (lambda: LadderResidual(layers=(-1,)), r"layers is \[-1\]"),
        (lambda: build(LadderResidual(layers=(3,))), "layers names layer 3 and the last one is 2"),
        (lambda: MUDDConnections(hidden_round=0), "hidden_round is 0"),
        (lambda: MUDDConnections(expand_last=0), "expand_last is 0"),
        (lambda: ReversibleResidual(grid_bits=0), "grid_bits is 0"),
        (lambda: Laurel(rank=0), "rank is 0"),
    ],
)
def test_wrong_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

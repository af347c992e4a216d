"""What every residual topology promises."""

import pytest
import torch
from torch import Tensor

from models.layer import Layer
from models.lm import LM
from models.params import initialize
from models.residual.denseformer import DenseFormer
from models.residual.desync import DesyncResidual
from models.residual.hyper import HyperConnections
from models.residual.hyper_fractional import FractionalHyperConnections
from models.residual.ladder import LadderResidual
from models.residual.mhc import ManifoldHyperConnections
from models.residual.mhc_lite import LiteManifoldHyperConnections
from models.residual.mhc_per_stream import PerStreamManifoldHyperConnections
from models.residual.midpoint import MidpointResidual
from models.residual.mudd import MUDDConnections
from models.residual.mudd_prepost import PrePostMUDD
from models.residual.plain import PlainResidual
from models.residual.reversible import ReversibleResidual
from models.slots import Connection, ResidualConfig
from models.state import Entry, Side, State, Views
from tests.contract import tiny
from tests.models.residuals import build, perturb, tokens

VARIANTS: dict[str, ResidualConfig] = {
    **{name: kind(**kind.example) for name, kind in ResidualConfig.kinds().items()},  # type: ignore[dict-item]
    "hyper-1": HyperConnections(streams=1),
    "hyper-rms": HyperConnections(streams=2, norm="rms", activation="identity"),
    "hyper_fractional-3x2": FractionalHyperConnections(fractions=2, streams=3),
    "ladder-hybrid": LadderResidual(layers=(1,)),
    "mhc-2": ManifoldHyperConnections(streams=2, iterations=3),
    "mhc_per_stream-3": PerStreamManifoldHyperConnections(streams=3),
    "mhc_lite-2": LiteManifoldHyperConnections(streams=2),
    "desync-every": DesyncResidual(ranks=2, every=3),
    "midpoint-grid": MidpointResidual(grid_bits=44),
    "mudd-released": MUDDConnections(separate_norms=False, hidden_round=64, expand_last=4),
    "mudd-2x2": MUDDConnections(dilation=2, period=2),
    "mudd-sw1": MUDDConnections(window=1),
    "mudd_prepost-2x2": PrePostMUDD(dilation=2, period=2),
    "mudd_prepost-sw1": PrePostMUDD(window=1, separate_norms=False),
    "denseformer-2x1": DenseFormer(dilation=2),
    "denseformer-1x2": DenseFormer(period=2),
    "reversible-grid": ReversibleResidual(grid_bits=44),
}
every_kind = pytest.mark.parametrize("residual", VARIANTS.values(), ids=VARIANTS)


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


def branch_output(views: Views) -> Tensor:
    """One for each of the branch's inputs."""
    shape = views.q_BTD.shape
    return torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)


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
        assert all(state[entry.name].dtype == entry.dtype_in(torch.float64) for entry in boundary)
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
        written = connection.write({**state, "other": other}, kept, branch_output(views))
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
        whole = connection.write(state, kept, branch_output(views))
        for name, x in connection.write(part, part_kept, branch_output(views)[cut]).items():
            torch.testing.assert_close(x, whole[name][cut], rtol=1e-12, atol=1e-12)


@every_kind
def test_every_parameter_learns_and_is_saved(residual: ResidualConfig) -> None:
    model, copy = build(residual), build(residual, seed=1)
    perturb(model)
    model(tokens(), tokens()).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("mixer", "values"),
    [("attention", "own"), ("attention", "svformer"), ("lru", "own"), ("lsh", "own"), ("rg_lru", "own")],
)
def test_a_view_that_nobody_reads_has_no_norm(mixer: str, values: str) -> None:
    """Where query, key and value inputs are mixed and normed apart, every parameter has a gradient all the same."""
    model = LM(tiny.build(mixer=mixer, values=values, residual={"kind": "mudd", "separate_norms": True}))
    initialize(model, 0)
    x = torch.arange(12).reshape(2, 6)
    loss = model(x, x).loss
    assert loss is not None
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

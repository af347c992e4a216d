"""What every discovered plug-in is held to. A new file is tested the moment it exists."""

import copy

import pytest
import torch

from models.config import LMConfig
from models.lm import LM, LOSSES
from models.params import initialize, named_specs
from models.plugin import promises
from models.state import Layout, Side
from tests.contract.draws import draw
from tests.contract.tiny import ALL_SLOTS, build, describe, every_kind, of_kind

KINDS = [pytest.param(of_kind(slot, kind), id=f"{slot}-{kind}") for slot, kind in every_kind()]
KEYS = torch.tensor([5, 6])
DRAWS = [pytest.param(draw(seed), id=f"draw{seed}") for seed in range(1000, 1012)]


def shaken(config: LMConfig, seed: int = 0) -> LM:
    """A float64 model off its initialisation, so that no path is switched off by a zero."""
    model = LM(config)
    initialize(model, seed)
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_shapes_gradients_and_dtype(config: LMConfig) -> None:
    model, x = shaken(config), tokens()
    assert model(x).logits.shape == (2, 9, 32)
    out = model(x, x, keys_B=KEYS)
    assert out.loss.dtype == torch.float64 and out.count == x.numel()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient in {describe(config)}"
        assert parameter.grad.dtype == torch.float64 and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_what_evaluation_leaves_out_changes_nothing(config: LMConfig) -> None:
    model, x = shaken(config), tokens()
    expected = model(x).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_deterministic(config: LMConfig) -> None:
    model, x = shaken(config), tokens()
    losses = [model(x, x, keys_B=KEYS).loss for _ in range(2)]
    first, second = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_causal(config: LMConfig) -> None:
    """Later tokens change nothing, bit for bit."""
    if not promises(config, "causal"):
        return
    model, x = shaken(config), tokens()
    y = x.clone()
    y[:, 5:] = (y[:, 5:] + 1) % 32
    before, after = model(x).logits[:, :5], model(y).logits[:, :5]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-13)


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_rows_are_independent(config: LMConfig) -> None:
    if not promises(config, "batch_independent"):
        return
    model, x = shaken(config), tokens(3)
    torch.testing.assert_close(model(x).logits[1:2], model(x[1:2]).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_documents_are_isolated(config: LMConfig) -> None:
    """A packed row is its documents, each on its own; padding is nobody's."""
    model, x = shaken(config), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    positions = torch.tensor([[*range(5), *range(4), *range(3)]])
    packed = model(x, documents_BT=documents, positions_BT=positions).logits
    alone = torch.cat([model(x[:, :5]).logits, model(x[:, 5:9]).logits], dim=1)
    torch.testing.assert_close(packed[:, :9], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
@pytest.mark.parametrize("split", [1, 4])
def test_decode_equals_forward(config: LMConfig, split: int) -> None:
    """A prompt, then token by token."""
    if not promises(config, "incremental"):
        return
    model, x = shaken(config), tokens()
    positions = torch.arange(9).expand(2, 9)
    out = model(x[:, :split], positions_BT=positions[:, :split], cache={})
    logits = [out.logits]
    for t in range(split, 9):
        out = model(x[:, t : t + 1], positions_BT=positions[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(x).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_rows_of_different_lengths_decode_as_if_alone(config: LMConfig) -> None:
    """Padding behind a row's tokens, in the prompt and later, moves no cache."""
    if not promises(config, "incremental", "batch_independent"):
        return
    model, x = shaken(config), tokens(3)
    whole = model(x).logits
    read, cache = torch.zeros(3, dtype=torch.int64), {}
    for lengths in ((5, 2, 1), (2, 0, 1), (1, 1, 1)):
        column_T = torch.arange(max(lengths))
        at_BT = (read[:, None] + column_T).clamp_max(8)
        real_BT = column_T < torch.tensor(lengths)[:, None]
        documents_BT = torch.where(real_BT, 0, -1)
        out = model(x.gather(1, at_BT), documents_BT=documents_BT, positions_BT=at_BT, cache=cache)
        expected = whole.take_along_dim(at_BT[..., None], dim=1)
        torch.testing.assert_close(out.logits[real_BT], expected[real_BT], rtol=0, atol=1e-10)
        read, cache = read + torch.tensor(lengths), out.cache


@pytest.mark.parametrize("config", [*KINDS, *DRAWS])
def test_declared_entries_are_the_state(config: LMConfig) -> None:
    """At every boundary: the keys, shapes and dtypes that the plan says, and nothing modified in place. A layer hands
    on what it was given, but for what it says that it writes or changes."""
    model, x = shaken(config), tokens()
    side = Side(x, torch.arange(9).expand(2, 9))
    assert model.embed is not None and model.embed_norm is not None and model.opener is not None
    state = model.opener(model.embed_norm(model.embed(x)))
    for layer, boundary in zip(model.blocks, model.boundaries, strict=False):
        entries = [entry for entry in boundary if entry.name != LOSSES.name]
        assert set(state) == {entry.name for entry in entries}, f"before layer {layer.index}"
        for entry in entries:
            assert state[entry.name].shape == (2, 9, *entry.shape), entry
            assert entry.layout is not Layout.HEADS or entry.shape[0] == entry.heads
        versions = {key: value._version for key, value in state.items()}
        after, _ = layer(state, side, side)
        assert {key: value._version for key, value in state.items()} == versions, f"layer {layer.index} writes in place"
        changed = {key for key, value in after.items() if key in state and value is not state[key]}
        assert changed <= {entry.name for _, writes in layer.events() for entry in writes} | set(layer.changes())
        state = after


@pytest.mark.parametrize("config", KINDS)
def test_recompute_safe(config: LMConfig) -> None:
    """Running a layer twice leaves the same result: nothing is counted or stored on the way."""
    model, x = shaken(config), tokens()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    first, second = (model(x, x, keys_B=KEYS) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first.stats[name], second.stats[name]) for name in first.stats)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("config", KINDS)
def test_meta_equals_real(config: LMConfig) -> None:
    """Built on the meta device and then filled, a model has the weights of one built in place."""
    real = LM(config)
    initialize(real, 7)
    with torch.device("meta"):
        late = LM(config)
    late.to_empty(device="cpu")
    initialize(late, 7)
    assert all(torch.equal(a, b) for a, b in zip(real.state_dict().values(), late.state_dict().values(), strict=True))
    assert real.state_dict().keys() == late.state_dict().keys()


@pytest.mark.parametrize("config", KINDS)
def test_every_parameter_is_declared(config: LMConfig) -> None:
    model = LM(config)
    assert {name for name, *_ in named_specs(model)} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("config", KINDS)
def test_state_dict_round_trip(config: LMConfig) -> None:
    model, x = shaken(config), tokens()
    other = LM(config).double()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(x).logits, other(x).logits)


@pytest.mark.parametrize("slot", ALL_SLOTS, ids=lambda slot: slot.slot)
def test_every_kind_is_documented(slot: type) -> None:
    for kind, config in slot.kinds().items():
        assert config.__doc__ and not config.__doc__.startswith(config.__name__ + "("), f"{slot.slot} {kind}"


def test_weights_do_not_depend_on_other_layers() -> None:
    """A parameter's initial value is a function of its name and the seed."""
    one, more = LM(build(2, scaling="rezero")), LM(build(2))
    initialize(one, 0)
    initialize(more, 0)
    states = one.state_dict(), more.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])

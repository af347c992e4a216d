"""Values that layers borrow, get back or look up: each against its equation, and what decoding keeps of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.cost import cost
from models.lm import LM
from models.params import initialize
from models.slots import Cache
from models.state import Valued
from tests.contract.tiny import build

VOCAB, WIDTH = 32, 16


def shaken(num_layers: int = 4, **fields: Any) -> LM:
    """A float64 model whose every parameter is off its initial value."""
    model = LM(build(num_layers, **fields)).double()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens(length: int = 7) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(2))


def part(model: LM, index: int) -> Any:
    return model.get_submodule(f"layers.{index}.mixer.branch.values")


def seen(model: LM) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(own values, values used, input of the values' projection) of every layer, from one run on `tokens()`."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: Any, args: tuple[Any, ...], out: Valued) -> None:
        found.append((args[0], out.v_BTHV, args[1].v_BTD))

    for index in range(len(model.layers)):
        part(model, index).register_forward_hook(record)
    model(tokens())
    return found


def test_plus_shares_out_the_first_values() -> None:
    model = shaken(values="resformer_plus")
    shares = part(model, 1).shares
    assert part(model, 3).shares is shares
    lambda1 = shares.scale * shares.logits.softmax(0)
    values = seen(model)
    torch.testing.assert_close(lambda1.sum(), shares.scale[0])
    for index in (1, 2, 3):
        expected = lambda1[index - 1] * values[0][0] + part(model, index).lambda2 * values[index][0]
        torch.testing.assert_close(values[index][1], expected)


def test_plus_starts_with_a_scale_of_the_number_of_layers() -> None:
    model = LM(build(4, values="resformer_plus"))
    initialize(model, 0)
    torch.testing.assert_close(part(model, 2).shares(2), torch.tensor([4 / 3]))


def test_sparse_leaves_the_other_layers_alone() -> None:
    values = seen(shaken(values={"kind": "resformer_sparse", "layers": [2], "lambda1": 5.0, "lambda2": 0.5}))
    for index in (0, 1, 3):
        assert torch.equal(values[index][0], values[index][1])
    torch.testing.assert_close(values[2][1], 5 * values[0][0] + 0.5 * values[2][0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "resformer_sparse", "layers": []}, r"layers is \[\]; it names at least one layer"),
        ({"kind": "resformer_sparse", "layers": [0]}, r"layers is \[0\]; .* none before layer 1"),
        ({"kind": "resformer_sparse", "layers": [4]}, "names layer 4 and the last one is 3; remove it"),
        ({"kind": "value_embedding"}, "tables is 3: .* there are 4; use at most 2, or 6 layers"),
        ({"kind": "value_embedding_gated", "channels": 17}, "channels is 17; d_model is 16, so use at most that many"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LM(build(values=values))


def test_tables_serve_both_ends() -> None:
    model = shaken(5, values={"kind": "value_embedding", "tables": 2})
    assert part(model, 0).table is part(model, 3).table and part(model, 1).table is part(model, 4).table
    assert part(model, 0).table is not part(model, 1).table
    values = seen(model)
    assert torch.equal(values[2][0], values[2][1])
    for index in (0, 1, 3, 4):
        own, mixed, _ = values[index]
        rows = part(model, index).table.weight[tokens()].view_as(own)
        torch.testing.assert_close(mixed, part(model, index).lambda1 * rows + part(model, index).lambda2 * own)


def test_tables_of_layers_with_other_heads_are_their_own() -> None:
    """One head layout at the start and another at the end: no rule is in the way."""
    wide = {"kind": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 4}
    narrow = {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
    ffn = {"kind": "swiglu", "hidden": 8}
    layers = {"A": {"mixer": wide, "ffn": ffn}, "B": {"mixer": narrow, "ffn": ffn}}
    model = shaken(1, layers=layers, pattern="AB", values="value_embedding")
    assert [part(model, index).table.weight.shape for index in (0, 1)] == [(VOCAB, 8), (VOCAB, 16)]
    assert model(tokens()).logits.isfinite().all()


def test_a_gate_per_head_opens_every_second_table() -> None:
    model = shaken(values={"kind": "value_embedding_gated", "channels": 5, "gate_range": 3.0})
    values = seen(model)
    for index in (0, 2):
        assert torch.equal(values[index][0], values[index][1])
    for index in (1, 3):
        own, mixed, x_BTD = values[index]
        gate_BTH = 3 * torch.sigmoid(x_BTD[..., :5] @ part(model, index).gate.weight.T)
        rows = part(model, index).table.weight[tokens()].view_as(own)
        torch.testing.assert_close(mixed, own + gate_BTH[..., None] * rows)


def test_looking_up_a_table_costs_no_products() -> None:
    plain, looked_up = (cost(build(values=values), 8) for values in ("own", "value_embedding"))
    assert looked_up.parameters - plain.parameters == VOCAB * 16 + 4
    assert looked_up.flops_per_token == plain.flops_per_token


def test_neutreno_gives_each_query_head_its_value_heads_difference() -> None:
    """Eight query heads over four value heads, which the authors' code does not do."""
    model, got = shaken(2, values={"kind": "neutreno", "strength": 0.7}), []
    values = part(model, 1)
    after = values.after
    values.after = lambda out, v, inputs: got.append((out, v, after(out, v, inputs))) or got[-1][2]
    first, own = seen(model)[0][0], None
    (out, own, restored) = got[0]
    for head in range(8):
        expected = out[:, :, head] + 0.7 * (first[:, :, head // 2] - own[:, :, head // 2])
        torch.testing.assert_close(restored[:, :, head], expected)


def size(cache: dict[str, Cache]) -> int:
    """Elements that grow with the sequence: keys and values."""
    kept = [(name, x) for layer in cache.values() for name, x in layer.items()]
    return sum(x.numel() for name, x in kept if name not in {"positions", "documents"})


def test_svformer_keeps_values_once() -> None:
    """Of L layers with equal keys and values, L keys and one layer of values are left: (L + 1) / 2L of the cache."""
    ids, positions = tokens(9), torch.arange(9).expand(2, 9)
    sizes = {}
    for kind in ("own", "svformer"):
        model = shaken(8, values=kind)
        out = model(ids[:, :6], positions_BT=positions[:, :6], cache={})
        for t in range(6, 9):
            out = model(ids[:, t : t + 1], positions_BT=positions[:, t : t + 1], cache=out.cache)
        sizes[kind] = size(out.cache)
        assert {name for layer in list(out.cache.values())[1:] for name in layer} >= {"k"}
    assert sizes["own"] == 8 * 2 * (2 * 9 * 4 * 4)
    assert sizes["svformer"] == 9 * (2 * 9 * 4 * 4)


def test_svformer_layers_make_no_values() -> None:
    own, borrowed = (LM(build(4, values=kind)) for kind in ("own", "svformer"))
    missing = {name for name, _ in own.named_parameters()} - {name for name, _ in borrowed.named_parameters()}
    assert missing == {f"layers.{index}.mixer.branch.mixer.v.weight" for index in (1, 2, 3)}


@pytest.mark.parametrize("pattern", ["AGA", "GAA"])
def test_svformer_in_a_hybrid_decodes_as_it_reads(pattern: str) -> None:
    """Recurrent layers take the new tokens' values alone; rows of different lengths, then token by token."""
    gated = {"kind": "gated_deltanet", "num_heads": 2, "num_value_heads": 4, "head_dim": 4, "expand_v": 1.0}
    attention = {"kind": "attention", "num_heads": 4, "head_dim": 4}
    ffn = {"kind": "swiglu", "hidden": 8}
    layers = {"A": {"mixer": attention, "ffn": ffn}, "G": {"mixer": gated, "ffn": ffn}}
    model, ids = shaken(1, layers=layers, pattern=pattern, values="svformer"), tokens(9)
    whole, lengths = model(ids).logits, torch.tensor([5, 2])
    documents = torch.where(torch.arange(5) < lengths[:, None], 0, -1)
    out = model(ids[:, :5], documents_BT=documents, cache={})
    for step in range(4):
        at = (lengths + step)[:, None]
        out = model(ids.gather(1, at), positions_BT=at, cache=out.cache)
        torch.testing.assert_close(out.logits[:, 0], whole[torch.arange(2), at[:, 0]], rtol=1e-11, atol=1e-11)


def test_a_mixer_without_a_projection_of_values_is_named() -> None:
    model = LM(build(1))
    mixer = model.blocks[0].mixer.branch.mixer
    mixer.drop_values()
    with pytest.raises(ValueError, match=r"Attention has no projection of values .* such as own"):
        mixer.drop_values()

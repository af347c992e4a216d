"""FLOPs against counts made by hand, and against torch's own counter."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.config import LMConfig
from models.cost import cost
from models.lm import LM
from models.params import initialize
from tests.contract.draws import VARIANTS
from tests.contract.tiny import build, every_kind, plain

WIDTH = 16  # of the small models
BETWEEN = ("residual", "shortcut", "values", "depth")  # the slots that say what they do between layers


def test_a_llama_by_hand() -> None:
    """6 N per token and 6 L H K T for causal attention."""
    mixer = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = build(mixer=mixer, ffn={"kind": "swiglu", "hidden": 24})
    width, layers, sequence = config.d_model, len(config.expanded), 64
    layer = width * 8 * (4 + 2 + 2) + 4 * 8 * width + 3 * width * 24
    found = cost(config, sequence)
    assert found.active == layers * layer + config.vocab_size * width
    assert found.flops_per_token == 6 * found.active + 6 * layers * 4 * 8 * sequence
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * width
    assert found.parameters == layers * (layer + 2 * width) + embeddings + width


@pytest.mark.parametrize("ffn", ["swiglu", "moe"])
def test_products_as_torch_counts_them(ffn: str) -> None:
    """On the forward pass, where a block of attention also computes the half that it masks."""
    config = build(mixer={"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "head_dim": 2}, ffn=ffn)
    model = LM(config).double()
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (2, 16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    masked = len(config.expanded) * 4 * 2 * 2 * 8
    assert counter.get_total_flops() == tokens.numel() * (cost(config, 16).flops_per_token / 3 + masked)


class Counted(NamedTuple):
    """FLOPs of a forward pass per token, as torch runs it. products: those of matrices, and multiply-adds along the
    model's width. scalings: as many for element-wise products, each of which may be half of a multiply-add."""

    products: float
    scalings: float


def counted(config: LMConfig) -> Counted:
    def along_width(*_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
        # Sums of D channels; small matrices, whose static part is added to a scaled one, are not.
        return 2 * math.prod(out_shape) if out_shape[-1] == WIDTH else 0

    def scaling(*_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
        return 2 * math.prod(out_shape)

    model = LM(config).double()
    initialize(model, 0)
    tokens = torch.randint(config.vocab_size, (2, 8))
    ops: dict[Any, Any] = {torch.ops.aten.addcmul: along_width, torch.ops.aten.mul: scaling}
    # With gradients, as in training: without them branches may leave tokens out.
    with FlopCounterMode(display=False, custom_mapping=ops) as counter:
        model(tokens)
    found = counter.get_flop_counts()["Global"]
    scalings = found.pop(torch.ops.aten.mul, 0)
    return Counted(sum(found.values()) / tokens.numel(), scalings / tokens.numel())


def forward(config: LMConfig) -> float:
    return cost(config, 8).flops_per_token / 3


@pytest.fixture(scope="module")
def base() -> tuple[Counted, float]:
    return counted(build()), forward(build())


@pytest.mark.parametrize(("slot", "kind"), [place for place in every_kind() if place[0] in BETWEEN])
def test_every_product_between_layers_counts(base: tuple[Counted, float], slot: str, kind: str) -> None:
    """Beyond plain layers, none of what torch runs as a product or multiply-add is left out, and nothing counts that
    torch does not run, element-wise at least."""
    for variant in ({}, *VARIANTS.get(kind, ())):
        fields: dict[str, Any] = {slot: {**plain(slot, kind), **variant}}
        config = build(**fields)
        found, more = counted(config), forward(config) - base[1]
        products, scalings = found.products - base[0].products, found.scalings - base[0].scalings
        assert products <= more <= products + scalings, variant


@pytest.mark.parametrize(
    "fields",
    [
        {"ffn": "moe"},
        {"mixer": "mla"},
        {"mixer": {"kind": "attention", "num_heads": 4, "num_kv_heads": 1, "head_dim": 4}},
    ],
    ids=["router", "latents", "repeated heads"],
)
def test_what_ranks_do_not_split_each_does_on_its_own_stream(fields: dict[str, Any]) -> None:
    apart, together = build(residual="desync", **fields), build(**fields)
    more = forward(apart) - forward(together)
    assert more == counted(apart).products - counted(together).products > 0


def low_rank(rank: int, sums: int, earlier: int) -> int:
    """Of the LAuReL kinds: B A at so many places, and a sum over so many earlier streams in all."""
    return 4 * rank * WIDTH * sums + 2 * WIDTH * earlier


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        # 8 sublayers of n streams: input and output 2 n D each, mix 2 n^2 D, and the columns that make them.
        ({"residual": {"kind": "hyper_static", "streams": 3}}, 8 * (2 * 2 * 3 + 2 * 9) * WIDTH),
        ({"residual": {"kind": "hyper", "streams": 4}}, 8 * (2 * 2 * 4 + 2 * 16 + 4 * 2 * 6) * WIDTH),
        # Each of 2 streams in 2 fractions: 4 rows of D / 2 give 2 rows, 4 rows and, of 2 rows of output, 4 rows.
        (
            {"residual": {"kind": "hyper_fractional", "streams": 2, "fractions": 2}},
            8 * (2 * 4 * 2 + 2 * 4 * 4 + 2 * 2 * 4 + 4 * 2 * (2 * 3 + 2)) * WIDTH // 2,
        ),
        ({"residual": {"kind": "mhc", "streams": 4}}, 8 * (2 * 2 * 4 + 2 * 16 + 2 * 4 * (16 + 4 + 4)) * WIDTH),
        ({"residual": {"kind": "mhc_per_stream", "streams": 4}}, 8 * (2 * 2 * 4 + 2 * 16 + 4 * 2 * 6) * WIDTH),
        (
            {"residual": {"kind": "mhc_lite", "streams": 3}},
            8 * ((2 * 2 * 3 + 2 * 9 + 2 * 3 * (3 + 6 + 3)) * WIDTH + 2 * 6 * 9),
        ),
        # In front of layers 1 to 3 and of the final norm.
        ({"residual": "denseformer"}, 2 * (2 + 3 + 4 + 5) * WIDTH),
        ({"residual": {"kind": "denseformer", "dilation": 2, "period": 2}}, 2 * (2 + 3) * WIDTH),
        # The same places; 4 ways of hidden width 4 J, and 1 way of 4 x 5 at the end.
        (
            {"residual": {"kind": "mudd", "expand_last": 4}},
            sum(2 * 4 * j * (WIDTH + 4 * j) + 2 * 4 * j * WIDTH for j in (2, 3, 4))
            + 2 * 20 * (WIDTH + 5)
            + 2 * 5 * WIDTH,
        ),
        (
            {"residual": {"kind": "mudd_prepost", "window": 1}},
            3 * (2 * 8 * (WIDTH + 8) + 2 * 8 * WIDTH) + 2 * 2 * (WIDTH + 2) + 2 * 2 * WIDTH,
        ),
        *(({"residual": kind}, 0) for kind in ("ladder", "desync", "midpoint", "reversible", "parallel")),
        ({"shortcut": "laurel_rw"}, 0),
        ({"shortcut": {"kind": "laurel_pa", "rank": 3}}, low_rank(3, 7, sum(range(8)))),
        ({"shortcut": {"kind": "laurel_pa", "rank": 3, "previous": 2}}, low_rank(3, 7, 13)),
        ({"shortcut": {"kind": "laurel_lr_pa", "rank": 3, "previous": 1}}, low_rank(3, 8 + 7, 7)),
        ({"shortcut": {"kind": "laurel_rw_lr_pa", "rank": 3, "previous": 1}}, low_rank(3, 8 + 7, 7)),
        # Three layers mix the first one's values, 4 heads of 4, into theirs.
        ({"values": "resformer"}, 3 * 2 * 2 * 16),
        ({"values": "neutreno"}, 3 * 2 * 16),
        ({"values": "neutreno_resformer"}, 3 * 3 * 2 * 16),
        # Four steps, of which three stop some tokens; all four outputs are summed.
        ({"depth": "universal_act"}, 3 * 2 * WIDTH + 4 * 2 * WIDTH),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_what_lies_between_layers_by_hand(fields: dict[str, Any], more: int) -> None:
    mixer = {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
    assert forward(build(mixer=mixer, **fields)) - forward(build(mixer=mixer)) == more


def test_hyper_connections_of_the_paper() -> None:
    """OLMo-1B with 4 streams adds 4 n D (n + 2) to each of 32 sublayers: 0.27 % of the products with matrices."""
    layer = {"mixer": {"kind": "attention", "num_heads": 16}, "ffn": {"kind": "swiglu", "hidden": 8192}}
    sizes: dict[str, Any] = {"vocab_size": 50304, "d_model": 2048, "layers": {"A": layer}, "tie_embeddings": True}
    streams, together = build(16, residual="hyper", **sizes), build(16, **sizes)
    more = forward(streams) - forward(together)
    assert more == 32 * 4 * 4 * 2048 * 6
    assert more / (2 * cost(together, 8).active) == pytest.approx(0.00267, abs=5e-6)

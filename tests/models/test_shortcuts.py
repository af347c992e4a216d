"""Shortcuts beyond the low-rank path, each against its equation in a whole model's first sublayers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.lm import LM
from models.params import initialize
from models.slots import ShortcutConfig
from tests.contract.tiny import build
from tests.models.test_values import shaken, tokens


class Trace:
    """Of every sublayer of a run, in order: what `Beside` saw and returned, and the stream behind it."""

    def __init__(self, model: LM) -> None:
        self.x: list[Tensor] = []
        self.view: list[Tensor] = []
        self.out: list[Tensor] = []
        for layer in model.blocks:
            for sublayer in (layer.mixer, layer.ffn):
                sublayer.register_forward_pre_hook(lambda module, args: self.x.append(args[0]["x"]))
                sublayer.beside.register_forward_pre_hook(self.beside)
        assert model.closer is not None
        model.closer.register_forward_pre_hook(lambda module, args: self.x.append(args[0]["x"]))
        model(tokens())

    def beside(self, module: Any, args: tuple[Any, ...]) -> None:
        self.view.append(args[1])
        self.out.append(args[2])


def sublayer(model: LM, index: int) -> Any:
    return model.blocks[index // 2].ffn if index % 2 else model.blocks[index // 2].mixer


def test_weights_of_branch_and_path() -> None:
    model = shaken(2, shortcut="laurel_rw")
    trace = Trace(model)
    for index in range(4):
        alpha, beta = 2 * sublayer(model, index).connection.shortcut.weights.logits.softmax(0)
        torch.testing.assert_close(trace.x[index + 1], alpha * trace.out[index] + beta * trace.x[index])


@pytest.mark.parametrize(("total", "alpha", "expected"), [(2.0, None, (1.0, 1.0)), (1.0, 0.2, (0.2, 0.8))])
def test_weights_start_where_the_config_says(total: float, alpha: float | None, expected: tuple[float, float]) -> None:
    model = LM(shaken(1, shortcut={"kind": "laurel_rw", "total": total, "alpha": alpha}).config)
    initialize(model, 0)
    weights = sublayer(model, 1).connection.shortcut.weights(torch.float32)
    torch.testing.assert_close(torch.stack(weights), torch.tensor(expected))


@pytest.mark.parametrize("kind", [kind for kind in ShortcutConfig.kinds() if kind not in ("none", "laurel_pa")])
def test_starts_as_the_plain_sublayer(kind: str) -> None:
    """To 1e-12 at any depth: a stream that shrank on the way would fall below the norms' eps."""
    plain, model = (LM(build(24, shortcut=shortcut)) for shortcut in ("none", kind))
    for one in (plain, model):
        initialize(one, 0)
    logits = [one.double()(tokens()).logits for one in (plain, model)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)


def test_previous_streams_are_counted_by_sublayers() -> None:
    model = shaken(2, shortcut={"kind": "laurel_rw_lr_pa", "rank": 3, "previous": 2})
    names = [[entry.name for entry in boundary] for boundary in model.boundaries]
    assert names == [["x"], ["x", "stream.0", "stream.1"], ["x"]]
    trace = Trace(model)
    for index in range(4):
        path = sublayer(model, index).connection.shortcut
        alpha, beta = 2 * path.weights.logits.softmax(0)
        earlier = list(range(max(0, index - 2), index))
        gamma = sublayer(model, index).beside.gamma if earlier else []
        weighted = trace.x[index] + sum(g * trace.x[j] for g, j in zip(gamma, earlier, strict=True))
        low = weighted @ path.path.down.weight.T @ path.path.up.weight.T
        expected = alpha * trace.out[index] + beta * (trace.x[index] + low)
        torch.testing.assert_close(trace.x[index + 1], expected)


def test_previous_streams_alone_leave_the_path() -> None:
    model = shaken(2, shortcut={"kind": "laurel_pa", "rank": 3})
    trace = Trace(model)
    beside = sublayer(model, 3).beside
    earlier = sum(g * x for g, x in zip(beside.gamma, trace.x[:3], strict=True))
    low = earlier @ beside.low_rank.down.weight.T @ beside.low_rank.up.weight.T
    torch.testing.assert_close(trace.x[4], trace.x[3] + trace.out[3] + low)


@pytest.mark.parametrize("norm", ["pre", "peri"])
def test_the_augmented_shortcut_reads_what_the_mixer_reads(norm: str) -> None:
    model = shaken(2, shortcut="pangu", norm=norm)
    trace = Trace(model)
    for index in range(4):
        added = trace.x[index + 1] - trace.x[index] - trace.out[index]
        if index % 2:
            torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=1e-14)
            continue
        read = sublayer(model, index).placement.norms[0](trace.x[index])
        beside = sublayer(model, index).beside
        expected = F.gelu(read @ beside.down.weight.T) @ beside.up.weight.T
        torch.testing.assert_close(added, expected)


def test_the_augmented_shortcut_needs_no_single_path() -> None:
    """It is part of what the mixer adds, and so works over streams."""
    model = shaken(2, shortcut="pangu", residual="hyper")
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("shortcut", "message"),
    [
        ({"kind": "laurel_rw", "alpha": 2.0}, "alpha is 2.0; it must lie between 0 and total 2.0"),
        ({"kind": "laurel_rw_lr_pa", "alpha": 0.0}, "alpha is 0.0; it must lie between 0 and total 2.0"),
        ({"kind": "laurel_pa", "previous": 0}, "previous is 0; it must be at least 1, or null for all"),
        ({"kind": "pangu", "reduction": 5}, "reduction 5 does not divide d_model 16"),
    ],
)
def test_what_cannot_be_is_refused(shortcut: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaken(shortcut=shortcut)

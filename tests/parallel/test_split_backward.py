"""Gradients that torch's split backward leaves, of parameters that meet in one operation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import _backward, stage

from parallel import split_backward


class Meeting(nn.Module):
    """Two parameters, which `meet` turns into one tensor [3, 8] to multiply by."""

    def __init__(self, rows: tuple[int, int], meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (
            nn.Parameter(torch.randn(count, 4, dtype=torch.float64, generator=generator)) for count in rows
        )
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.meet(self.first, self.second)).tanh()


def added(first: Tensor, second: Tensor) -> Tensor:
    return (first + second).repeat(1, 2)


def beside(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], 1)


def backward(model: Meeting, inputs: list[Tensor], split: bool) -> list[Tensor]:
    """The gradients after one micro-batch per input."""
    model.zero_grad()
    for value in inputs:
        x = value.clone().requires_grad_()
        out = model(x)
        if split:
            _, groups = _backward.stage_backward_input([out], [torch.ones_like(out)], [x], model.parameters())
            split_backward.weight_gradients(model.parameters(), groups)
        else:
            out.sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


def test_added_parameters_have_gradients_of_their_own() -> None:
    model = Meeting((3, 3), added)
    expected = backward(model, inputs(), split=False)
    got = backward(model, inputs(), split=True)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    got[0].zero_()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-14, atol=1e-14)


def test_gradients_are_laid_out_as_the_parameters() -> None:
    """Fused optimisers and collectives read memory as it lies."""
    model = Meeting((3, 3), beside)
    expected = backward(model, inputs(), split=False)
    got = backward(model, inputs(), split=True)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    for parameter, grad in zip(model.parameters(), got, strict=True):
        assert grad.stride() == parameter.stride() and grad.untyped_storage().nbytes() == 8 * grad.numel()


def test_a_schedule_uses_them() -> None:
    split_backward.correct()
    assert vars(stage)["stage_backward_weight"] is split_backward.weight_gradients
    assert _backward.get_param_groups is split_backward.groups

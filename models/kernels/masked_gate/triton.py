"""MoE++'s gate as Triton kernels: all of it in one read of the logits.

Shape suffixes: N tokens, E experts, K picks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.opaque import shaped_by

HELD = 4096  # logits that a program holds


@triton.jit
def places(tokens, experts, TOP: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PICKS: tl.constexpr):
    """Offsets into [N, E] and [N, K], which are inside them, and the numbers of experts and picks."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    expert, pick = tl.arange(0, EXPERTS)[None, :], tl.arange(0, PICKS)[None, :]
    inside, picked = (token < tokens) & (expert < experts), (token < tokens) & (pick < TOP)
    return token * experts + expert, inside, expert, token * TOP + pick, picked, pick


@triton.jit
def gate_kernel(
    logits, earlier, picks, total, probs, index, weights, tokens, experts, first_zero, TOP: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PICKS: tl.constexpr, ADDS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """EXPERTS, PICKS: to powers of 2. ADDS: there are earlier logits. GIVEN: picks are not to be made."""
    at, inside, expert, at_pick, picked, pick = places(tokens, experts, TOP, BLOCK, EXPERTS, PICKS)
    x = tl.load(logits + at, mask=inside, other=float("-inf"))
    if ADDS:
        x += tl.load(earlier + at, mask=inside, other=0.0)
    tl.store(total + at, x, mask=inside)
    # Of tokens that are not there all are equal, and no number is made of -inf less -inf.
    x = tl.where(inside | (expert >= experts), x, 0.0)
    e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    p = e / tl.sum(e, axis=1, keep_dims=True)
    tl.store(probs + at, p, mask=inside)
    left = tl.where(expert < experts, p, -1.0)
    chosen = tl.zeros([BLOCK, PICKS], p.dtype)
    numbers = tl.zeros([BLOCK, PICKS], tl.int64)
    if GIVEN:
        numbers = tl.load(picks + at_pick, mask=picked, other=0)
    for k in tl.static_range(TOP):
        if GIVEN:
            number = tl.sum(tl.where(pick == k, numbers, 0), axis=1, keep_dims=True)
        else:
            number = tl.argmax(left, axis=1, keep_dims=True, tie_break_left=True).to(tl.int64)
            numbers = tl.where(pick == k, number, numbers)
            left = tl.where(expert == number, -1.0, left)
        own = tl.sum(tl.where(expert == number, p, 0.0), axis=1, keep_dims=True)
        chosen = tl.where((pick == k) & (number < first_zero), own, chosen)
    whole = tl.sum(chosen, axis=1, keep_dims=True)
    tl.store(index + at_pick, numbers, mask=picked)
    tl.store(weights + at_pick, chosen / tl.where(whole > 0.0, whole, 1.0), mask=picked)


@triton.jit
def gate_backward_kernel(
    probs, index, grad_total, grad_probs, grad_weights, dlogits, tokens, experts, first_zero, TOP: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    at, inside, expert, at_pick, picked, pick = places(tokens, experts, TOP, BLOCK, EXPERTS, PICKS)
    p = tl.load(probs + at, mask=inside, other=0.0)
    numbers = tl.load(index + at_pick, mask=picked, other=0)
    dw = tl.load(grad_weights + at_pick, mask=picked, other=0.0)
    chosen = tl.zeros([BLOCK, PICKS], p.dtype)
    for k in tl.static_range(TOP):
        number = tl.sum(tl.where(pick == k, numbers, 0), axis=1, keep_dims=True)
        own = tl.sum(tl.where(expert == number, p, 0.0), axis=1, keep_dims=True)
        chosen = tl.where((pick == k) & (number < first_zero), own, chosen)
    whole = tl.sum(chosen, axis=1, keep_dims=True)
    safe = tl.where(whole > 0.0, whole, 1.0)
    common = tl.where(whole > 0.0, tl.sum(dw * chosen, axis=1, keep_dims=True) / safe, 0.0)
    draw = tl.where(numbers < first_zero, (dw - common) / safe, 0.0)
    dp = tl.load(grad_probs + at, mask=inside, other=0.0)
    for k in tl.static_range(TOP):
        number = tl.sum(tl.where(pick == k, numbers, 0), axis=1, keep_dims=True)
        dp += tl.where(expert == number, tl.sum(tl.where(pick == k, draw, 0.0), axis=1, keep_dims=True), 0.0)
    dx = p * (dp - tl.sum(p * dp, axis=1, keep_dims=True))
    tl.store(dlogits + at, dx + tl.load(grad_total + at, mask=inside, other=0.0), mask=inside)


def shapes(
    logits_NE: Tensor, earlier_NE: Tensor | None, top_k: int, first_zero: int, picked_NK: Tensor | None
) -> list[Tensor]:
    per_pick = (len(logits_NE), top_k)
    index_NK = logits_NE.new_empty(per_pick, dtype=torch.int64)
    total_NE, probs_NE = (torch.empty_like(logits_NE, memory_format=torch.contiguous_format) for _ in range(2))
    return [total_NE, probs_NE, index_NK, logits_NE.new_empty(per_pick)]


@shaped_by(shapes)
def gate(
    logits_NE: Tensor, earlier_NE: Tensor | None, top_k: int, first_zero: int, picked_NK: Tensor | None
) -> list[Tensor]:
    made = shapes(logits_NE, earlier_NE, top_k, first_zero, picked_NK)
    logits_NE = logits_NE.contiguous()
    # What is not there is not read: anything stands for it.
    earlier_NE, adds = (logits_NE, False) if earlier_NE is None else (earlier_NE.contiguous(), True)
    picked_NK, given = (made[2], False) if picked_NK is None else (picked_NK.contiguous(), True)
    operands = (logits_NE, earlier_NE, picked_NK, *made)
    launch(gate_kernel, logits_NE, top_k, first_zero, operands, ADDS=adds, GIVEN=given)
    return made


def gradient_shape(probs_NE: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(probs_NE)


@shaped_by(gradient_shape)
def gate_backward(probs_NE: Tensor, index_NK: Tensor, grads: list[Tensor], first_zero: int) -> Tensor:
    """grads: of the logits, the probabilities and the weights."""
    dlogits_NE = gradient_shape(probs_NE)
    operands = (probs_NE, index_NK, *(grad.contiguous() for grad in grads), dlogits_NE)
    launch(gate_backward_kernel, probs_NE, index_NK.shape[1], first_zero, operands)
    return dlogits_NE


def launch(
    kernel: Any, logits_NE: Tensor, top_k: int, first_zero: int, operands: tuple[Tensor, ...], **flags: bool
) -> None:
    tokens, experts = logits_NE.shape
    padded = triton.next_power_of_2(experts)
    size = max(1, HELD // padded)
    if tokens:
        kernel[(triton.cdiv(tokens, size),)](
            *operands,
            tokens,
            experts,
            first_zero,
            TOP=top_k,
            BLOCK=size,
            EXPERTS=padded,
            PICKS=triton.next_power_of_2(top_k),
            **flags,
        )


class _MaskedGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        earlier_NE: Tensor | None,
        top_k: int,
        first_zero: int,
        picked_NK: Tensor | None,
    ) -> tuple[Tensor, ...]:
        total_NE, probs_NE, index_NK, weights_NK = gate(logits_NE, earlier_NE, top_k, first_zero, picked_NK)
        ctx.save_for_backward(probs_NE, index_NK)
        ctx.first_zero = first_zero
        ctx.mark_non_differentiable(index_NK)
        return total_NE, probs_NE, index_NK, weights_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        probs_NE, index_NK = ctx.saved_tensors
        dlogits_NE = gate_backward(probs_NE, index_NK, [grads[0], grads[1], grads[3]], ctx.first_zero)
        return dlogits_NE, dlogits_NE if ctx.needs_input_grad[1] else None, None, None, None


def masked_gate(
    logits_E: Tensor, earlier_E: Tensor | None, top_k: int, first_zero: int, picked_K: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `models.kernels.masked_gate.reference`. Of equal probabilities the earlier expert is picked."""
    tokens = logits_E.shape[:-1]
    rows = [None if x is None else x.flatten(0, -2) for x in (logits_E, earlier_E, picked_K)]
    total, probs, index, weights = _MaskedGate.apply(rows[0], rows[1], top_k, first_zero, rows[2])
    return (
        total.view(*logits_E.shape),
        probs.view(*logits_E.shape),
        index.view(*tokens, top_k),
        weights.view(*tokens, top_k),
    )

"""Corrections of torch's split backward, which zero-bubble, ZBV and DualPipeV schedules run.

Gradients of a stage's inputs come first. Those of parameters come later, group by group, from where a group's paths
meet the paths to the inputs. A group that meets them at several places goes backward through all that lies between, and
what it went through cannot be gone through again by another group that meets them there: in torch (2.11 to 2.13) a
parameter that two layers of a stage share, or that is used twice within one, ends the step with an error. Here such
groups are one.

Once it has a parameter's gradient, torch (2.11 to 2.13) makes that very tensor the parameter's `.grad`, and adds those
of later micro-batches to it in place. Two parameters that are added to one another have one tensor between them, which
then gets every sum and every clipping twice; one that came through a concatenation has a view that is not laid out as
the parameter is, which a fused optimiser reads as if it were. Here every gradient begins as zeros of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.distributed.pipelining import _backward, stage

Group = dict[str, set[Node]]


def groups(inputs: list[Node], params: list[Node], reverse_edges_dict: Any) -> list[Group]:
    """Stands in for `get_param_groups`. "params" of each group, and "intermediates": where it meets the paths to the
    inputs; no group goes through an intermediate of another."""
    closure, _ = _backward.reverse_closure(inputs, set(), reverse_edges_dict)
    found: list[Group] = []
    for param in params:
        _, met = _backward.reverse_closure([param], closure, reverse_edges_dict)
        if met:
            found = joined(found, {"params": {param}, "intermediates": met}, met)
    # Groups that became one have ways between them that none of them had.
    before = len(found) + 1
    while len(found) < before:
        before = len(found)
        for group in [group for group in found if len(group["intermediates"]) > 1]:
            # It may be part of another one by now, which then goes through all that it went through.
            found = joined(found, {"params": set(), "intermediates": set()}, between(group["intermediates"], closure))
    return found


def joined(found: list[Group], new: Group, through: set[Node]) -> list[Group]:
    """The groups, of which those with an intermediate that `new` goes through are one with it."""
    apart = [group for group in found if not group["intermediates"] & through]
    same = [group for group in found if group["intermediates"] & through]
    return [*apart, {key: nodes.union(*(group[key] for group in same)) for key, nodes in new.items()}]


def between(nodes: set[Node], closure: set[Node]) -> set[Node]:
    """The nodes, and what may lie on a way from one of them to another. Autograd numbers nodes as they are made, so
    that nothing older than the oldest does."""
    oldest = min(number(node) for node in nodes)
    found, todo = set(nodes), list(nodes)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node in closure and node not in found and number(node) >= oldest:
                found.add(node)
                todo.append(node)
    return found


def number(node: Node) -> int:
    return node._sequence_nr()  # type: ignore[attr-defined]


def weight_gradients(
    weights: Iterable[torch.nn.Parameter], param_groups: list[Group], retain_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """Stands in for `stage_backward_weight`: adds to the gradient of every parameter, in memory of its own."""
    weights = list(weights)
    for weight in weights:
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    return _backward.stage_backward_weight(iter(weights), param_groups, retain_graph)


def correct() -> None:
    """Have torch use them, in this process."""
    _backward.get_param_groups = groups
    stage.stage_backward_weight = weight_gradients  # pyright: ignore[reportPrivateImportUsage]

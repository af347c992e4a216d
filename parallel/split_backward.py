"""A correction of torch's split backward, which zero-bubble, ZBV and DualPipeV schedules run.

Gradients of a stage's inputs come first. Those of parameters come later, group by group, from where a group's paths
meet the paths to the inputs. A group that meets them at several places goes backward through all that lies between, and
what it went through cannot be gone through again by another group that meets them there: in torch (2.11 to 2.13) a
parameter that two layers of a stage share, or that is used twice within one, ends the step with an error. Here such
groups are one.
"""

from typing import Any

from torch.autograd.graph import Node
from torch.distributed.pipelining import _backward

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


def correct() -> None:
    """Have torch use it, in this process."""
    _backward.get_param_groups = groups

"""Which models can generate: those whose plug-ins all say that they are causal, incremental and batch-independent."""

from collections.abc import Iterator
from types import MappingProxyType

from models.config import LMConfig
from models.plugin import plugins_in

REASONS = MappingProxyType(
    {
        "causal": "its output for a token depends on later tokens, which do not exist yet",
        "batch_independent": "its output for a sequence depends on the others in the batch",
        "incremental": "it cannot continue from what it has seen before",
    }
)


def refusals(config: LMConfig) -> Iterator[str]:
    """One sentence for each kind that cannot generate, and why."""
    seen = set()
    for plugin in plugins_in(config):
        for property, reason in REASONS.items():
            if (type(plugin), property) not in seen and not getattr(plugin, property, True):
                seen.add((type(plugin), property))
                yield f"{plugin.slot} {plugin.kind} cannot generate: {reason}; use another {plugin.slot} kind for that"


def check_generates(config: LMConfig) -> None:
    """Raise ValueError with the first reason why a model cannot generate."""
    for reason in refusals(config):
        raise ValueError(reason)

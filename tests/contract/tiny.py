"""Small configs: one per discovered kind, and random legal combinations of all of them."""

import random
from typing import Any

from configs.structure import instantiate
from models.config import LMConfig
from models.plugin import Plugin
from models.rules import reasons
from models.slots import (
    DepthConfig,
    FFNConfig,
    MixerConfig,
    NormConfig,
    ResidualConfig,
    ScalingConfig,
    ShortcutConfig,
    ValuesConfig,
)

SLOTS: tuple[type[Plugin], ...] = (
    MixerConfig,
    FFNConfig,
    ResidualConfig,
    ValuesConfig,
    NormConfig,
    ShortcutConfig,
    ScalingConfig,
    DepthConfig,
)
LETTERS = "ABCD"


def every_kind() -> list[tuple[str, str]]:
    """(slot, kind) of everything that is discovered."""
    return [(slot.slot, kind) for slot in SLOTS for kind in slot.kinds()]


def plain(slot: str, kind: str) -> dict[str, Any]:
    """The plain config of a kind's example."""
    base = next(base for base in SLOTS if base.slot == slot)
    return {"kind": kind, **base.of_kind(kind).example}


def build(num_layers: int = 4, **fields: Any) -> LMConfig:
    """Attention and SwiGLU layers, with `fields` (slots by kind name or plain config) in place."""
    layer: dict[str, Any] = {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "swiglu")}
    data: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "pattern": "A", "repeat": num_layers}
    for name, value in fields.items():
        value = plain(name, value) if isinstance(value, str) and name in {slot.slot for slot in SLOTS} else value
        (layer if name in layer else data)[name] = value
    return instantiate(LMConfig, {"layers": {"A": layer}, **data})


def of_kind(slot: str, kind: str) -> LMConfig:
    fields: dict[str, Any] = {slot: kind}
    return build(**fields)


def draw(seed: int) -> LMConfig:
    """A random combination that no rule refuses: up to four kinds of layer, every slot drawn, tied or not."""
    generator = random.Random(seed)
    while True:
        letters = LETTERS[: generator.randint(1, 4)]
        pattern = "".join(generator.choice(letters) for _ in range(4))
        data: dict[str, Any] = {
            "vocab_size": 32,
            "d_model": 16,
            "pattern": pattern,
            "tie_embeddings": generator.random() < 0.3,
            "layers": {
                letter: {
                    "mixer": plain("mixer", generator.choice(list(MixerConfig.kinds()))),
                    "ffn": plain("ffn", generator.choice(list(FFNConfig.kinds()))),
                }
                for letter in sorted(set(pattern))
            },
        }
        for slot in SLOTS[2:]:
            data[slot.slot] = plain(slot.slot, generator.choice(list(slot.kinds())))
        config = instantiate(LMConfig, data)
        if not list(reasons(config)):
            return config


def describe(config: LMConfig) -> str:
    layers = " ".join(f"{layer.mixer.kind}+{layer.ffn.kind}" for layer in config.expanded)
    rest = " ".join(getattr(config, slot.slot).kind for slot in SLOTS[2:])
    return f"{layers} | {rest}{' tied' if config.tie_embeddings else ''}"

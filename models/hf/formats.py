"""The two forms of an exported model: with code of its own, or as a model that transformers already has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from configs.errors import did_you_mean
from configs.structure import to_plain
from models.config import LMConfig
from models.decoding import refusals
from models.hf.architecture import Architecture, choose
from models.hf.sources import Sources, collect
from models.lm import LM
from models.plugin import plugins_in

ROOTS = ("models.hf.configuration_weft", "models.hf.modeling_weft")


class Format:
    """What an exported folder holds beside tokenizer and card.

    remote_code: whether it brings code. tolerance: how far the reloaded model's logits may be from ours, of the
    largest. about: a paragraph for the card. label: for messages.
    """

    remote_code: ClassVar[bool]
    tolerance: ClassVar[float]
    about: str
    label: str

    def config(self, config: LMConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """What config.json says. settings: the keys that are not the model's own; None is unknown."""
        raise NotImplementedError

    def tensors(self, model: LM) -> dict[str, Tensor]:
        """By the name that they have in the files."""
        raise NotImplementedError

    def check_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The type that both sides are compared in: at least float32, whatever the stored type."""
        return torch.promote_types(stored, torch.float32)

    def write_sources(self, config: LMConfig, folder: Path) -> frozenset[str]:
        """Write the code; returns the packages that it can do without."""
        return frozenset()


def sources_of(config: LMConfig) -> Sources:
    """The code of a self-contained folder."""
    return collect(ROOTS, {type(plugin).__module__ for plugin in plugins_in(config)})


class SelfContained(Format):
    """Carries the modules that the model was trained with, as `weft_*.py`."""

    remote_code = True
    # Both sides run the same operations on the same weights, so that only the order of sums can differ: about
    # sqrt(width) * 6e-8 of the largest logit in float32. A wrong weight or config shows at 1e-2 and above.
    tolerance = 1e-5
    about = (
        "The folder is self-contained: it needs `torch`, `transformers` and `safetensors`, and nothing of Weft. The "
        "model is\ncomputed by the very modules that it was trained with, copied here as `weft_*.py`; `config.json` "
        "holds their whole\nconfig under `weft`."
    )

    def __init__(self, why: str | None = None) -> None:
        """why: what keeps the model from being native."""
        self.label = "a self-contained folder" + ("" if why is None else f" (not native: {why})")

    def config(self, config: LMConfig, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["WeftForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_weft.WeftConfig",
                "AutoModelForCausalLM": "modeling_weft.WeftForCausalLM",
            },
            "model_type": "weft",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.expanded),
            "tie_word_embeddings": config.tie_embeddings,
            "use_cache": not any(refusals(config)),
            **{key: value for key, value in settings.items() if value is not None},
            "weft": to_plain(config),
        }

    def tensors(self, model: LM) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}

    def write_sources(self, config: LMConfig, folder: Path) -> frozenset[str]:
        sources = sources_of(config)
        for name, text in sources.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return sources.optional


class Native(Format):
    """A model class of transformers, with its names of keys and weights."""

    remote_code = False
    # The two sides compute the same formulas with different operations: each layer adds a few roundings of 6e-8, which
    # is 1e-6 to 1e-5 over tens of layers. A wrong weight or config shows at 1e-2 and above.
    tolerance = 1e-4

    def __init__(self, architecture: type[Architecture]) -> None:
        self.architecture = architecture
        self.label = f"a {architecture.kind} model"
        self.about = f"It is a `{architecture.model_class}`, exactly; no code comes with it."

    def config(self, config: LMConfig, settings: dict[str, Any]) -> dict[str, Any]:
        # Token ids that are unknown are written too, because the classes' defaults are those of other tokenizers.
        known = {key: value for key, value in settings.items() if value is not None or key.endswith("token_id")}
        return {
            "architectures": [self.architecture.model_class],
            "model_type": self.architecture.kind,
            **self.architecture.hf_config(config),
            "use_cache": True,
            **known,
        }

    def check_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float32  # its norms and routers compute in no other type, and its experts refuse float64

    def tensors(self, model: LM) -> dict[str, Tensor]:
        state, found = model.state_dict(), {}
        for link in self.architecture.links(model.config):
            theirs = link.to_theirs([state.pop(name) for name in link.ours])
            found |= {name: tensor.contiguous() for name, tensor in zip(link.theirs, theirs, strict=True)}
        assert not state, f"{self.architecture.kind} has no name for {sorted(state)}"
        return found


def native(config: LMConfig) -> Format:
    """Raises ValueError, with the nearest architecture and what it lacks, where there is none."""
    architecture, reason = choose(config)
    if reason is not None:
        raise ValueError(
            f"no architecture of transformers is this model: of the nearest, {architecture.kind}, {reason}; "
            "change that, or use the format self-contained"
        )
    return Native(architecture)


def auto(config: LMConfig) -> Format:
    """Native where the model is exactly one of transformers' own, otherwise self-contained."""
    architecture, reason = choose(config)
    return Native(architecture) if reason is None else SelfContained(why=reason)


def self_contained(config: LMConfig) -> Format:
    return SelfContained()


def chooser(name: str) -> Callable[[LMConfig], Format]:
    """By the name that users give."""
    known = {choice.__name__.replace("_", "-"): choice for choice in (auto, native, self_contained)}
    if name not in known:
        raise ValueError(f"format is {name!r}; {did_you_mean(name, known)}the formats are {', '.join(known)}")
    return known[name]

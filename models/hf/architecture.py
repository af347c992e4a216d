"""What an architecture of Hugging Face transformers has to say so that our models can be written and read as one."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from models.compare import Difference, differences, said
from models.config import LayerConfig, LMConfig
from models.hf.links import Link
from models.plugin import Plugin

# Where a layer's parameters stand in an `LM`, behind `layers.<index>.`.
MIXER, FFN = "mixer.branch.mixer.", "ffn.branch.ffn."
MIXER_NORM, FFN_NORM = "mixer.placement.norms.0.weight", "ffn.placement.norms.0.weight"


class Architecture(Plugin, slot="architecture", folder="models.hf.native"):
    """One model class of transformers; its kind is the `model_type`. A class is all there is: it has no instances.

    model_class: the name of its causal language model. norm: how the weight of a layer's or the last norm is stored.
    reads: False where storing a model changes its bits, so that reading it back would not be exact. harmless: keys of
    config.json, beside those of `models.hf.read`, that `lm_config` accounts for or that change nothing.
    """

    model_class: ClassVar[str]
    norm: ClassVar[type[Link]] = Link
    reads: ClassVar[bool] = True
    harmless: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def hf_config(cls, config: LMConfig) -> dict[str, Any]:
        """The keys of config.json that describe the model. A setting that there is no key for is left out, and what is
        missing (the heads of a model without attention, say) has any value: `matches` finds both."""
        raise NotImplementedError

    @classmethod
    def lm_config(cls, fields: Mapping[str, Any]) -> LMConfig:
        """The model that such keys describe. Raises ValueError for one that we do not have."""
        raise NotImplementedError

    @classmethod
    def layer_links(cls, layer: LayerConfig, ours: str, theirs: str) -> Iterator[Link]:
        """The parameters of one layer except its two norms; names begin with `ours` and `theirs`."""
        raise NotImplementedError

    @classmethod
    def limit(cls, config: LMConfig) -> str | None:
        """A rule of the class that no setting shows: why it refuses a model whose settings it has."""
        return None

    @classmethod
    def differences(cls, config: LMConfig) -> list[Difference]:
        """The settings of `config` that this architecture does not have, each with the value that it has instead."""
        return differences(config, cls.lm_config(cls.hf_config(config)))

    @classmethod
    def matches(cls, config: LMConfig) -> str | None:
        """None when this architecture computes exactly what `config` does; otherwise the first thing that differs."""
        try:
            found = cls.differences(config)
        except ValueError as error:
            return f"{cls.kind} cannot hold it: {error}"
        if found:
            key, ours, theirs = found[0]
            return f"{key} is {said(ours)}, and {cls.kind} has {said(theirs)}"
        return cls.limit(config)

    @classmethod
    def links(cls, config: LMConfig) -> list[Link]:
        """Every parameter and buffer of a model that matches."""
        links = [Link(("embed.weight",), ("model.embed_tokens.weight",))]
        for index, layer in enumerate(config.expanded):
            ours, theirs = f"layers.{index}.", f"model.layers.{index}."
            links.append(cls.norm((ours + MIXER_NORM,), (theirs + "input_layernorm.weight",)))
            links.append(cls.norm((ours + FFN_NORM,), (theirs + "post_attention_layernorm.weight",)))
            links += cls.layer_links(layer, ours, theirs)
        links.append(cls.norm(("norm.weight",), ("model.norm.weight",)))
        if not config.tie_embeddings:
            links.append(Link(("head.weight",), ("lm_head.weight",)))
        return links


class Choice(NamedTuple):
    """The architecture that holds a model, or the nearest one and why it does not."""

    architecture: type[Architecture]
    reason: str | None


def choose(config: LMConfig) -> Choice:
    """Of the architectures that match, the first by name; otherwise the nearest one: with the fewest kinds of plug-in
    that differ, then with the fewest settings."""
    ranked = []
    for name, architecture in Architecture.kinds().items():
        reason = architecture.matches(config)
        if reason is None:
            return Choice(architecture, None)
        try:
            found = architecture.differences(config)
        except ValueError:
            continue
        kinds = sum(difference.of_slot for difference in found)
        ranked.append((kinds, len(found), name, Choice(architecture, reason)))
    return min(ranked, key=lambda item: item[:3])[3]

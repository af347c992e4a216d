"""What architectures of transformers share: keys and weights of attention and FFNs, and how layers are spelled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from configs.structure import instantiate
from models.config import LayerConfig, LMConfig
from models.ffn.moe import MoEConfig
from models.ffn.routing import RouterConfig
from models.ffn.swiglu import SwiGLUConfig
from models.hf.architecture import FFN, MIXER
from models.hf.links import Link, Stacked, renamed
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from models.plugin import Plugin
from models.routers.deepseek_v2 import DeepSeekV2Config
from models.routers.mixtral import MixtralConfig

Kind = TypeVar("Kind", bound=Plugin)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROJECTIONS = ("q", "k", "v")


def first(config: LMConfig, cls: type[Kind]) -> Kind:
    """The first mixer or FFN of exactly this class; its example where there is none."""
    for layer in config.expanded:
        for plugin in (layer.mixer, layer.ffn):
            if type(plugin) is cls:
                return plugin
    return instantiate(cls, cls.example)


def model_keys(config: LMConfig) -> dict[str, Any]:
    """The keys of the model as a whole and of its attention, which nearly all architectures name alike."""
    attention = first(config, AttentionConfig).canonical(config.d_model)
    # Readers older than transformers 5 know rope_theta alone.
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.expanded),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "rope_theta": attention.rope_theta,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def attention_of(fields: Mapping[str, Any], **settings: Any) -> AttentionConfig:
    """The attention that `model_keys` describe, with the settings that an architecture gives it."""
    return AttentionConfig(
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim"),
        rope_theta=float(fields["rope_parameters"]["rope_theta"]),
        **settings,
    )


def model_of(fields: Mapping[str, Any], layers: Sequence[LayerConfig]) -> LMConfig:
    """A pre-norm model of these layers."""
    kinds = list(dict.fromkeys(layers))
    letters = "".join(LETTERS[kinds.index(layer)] for layer in layers)
    period = next(n for n in range(1, len(letters) + 1) if letters[:n] * (len(letters) // n) == letters)
    return LMConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        layers={LETTERS[index]: layer for index, layer in enumerate(kinds)},
        pattern=letters[:period],
        repeat=len(letters) // period,
        norm=PreNorm(fields["rms_norm_eps"]),
        tie_embeddings=fields["tie_word_embeddings"],
    )


def attention_links(attention: AttentionConfig, ours: str, theirs: str) -> Iterator[Link]:
    names = {f"{name}.weight": f"{name}_proj.weight" for name in (*PROJECTIONS, "o")}
    if attention.qkv_bias:
        names |= {f"{name}.bias": f"{name}_proj.bias" for name in PROJECTIONS}
    if attention.qk_norm:
        names |= {f"{name}_norm.weight": f"{name}_norm.weight" for name in ("q", "k")}
    yield from renamed(names, ours + MIXER, theirs + "self_attn.")


def swiglu_links(ours: str, theirs: str) -> Iterator[Link]:
    yield from renamed({f"{name}.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")}, ours, theirs)


def ffn_links(ffn: Plugin, ours: str, theirs: str) -> Iterator[Link]:
    """Of a SwiGLU, or of routed experts as Qwen stores them."""
    if not isinstance(ffn, MoEConfig):
        yield from swiglu_links(ours + FFN, theirs + "mlp.")
        return
    yield from renamed({"router.weight": "gate.weight"}, ours + FFN, theirs + "mlp.")
    for name in ("gate", "up", "down"):
        experts = tuple(f"{theirs}mlp.experts.{index}.{name}_proj.weight" for index in range(ffn.num_experts))
        yield Stacked((f"{ours}{FFN}experts.{name}",), experts)


def sparse_layers(config: LMConfig) -> dict[str, Any]:
    """The keys that say which layers route, and how."""
    ffn = first(config, MoEConfig)
    dense = [index for index, layer in enumerate(config.expanded) if not isinstance(layer.ffn, MoEConfig)]
    normalized, top_k = isinstance(ffn.router, MixtralConfig), getattr(ffn.router, "top_k", 1)
    keys = {
        "num_experts": ffn.num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": ffn.hidden,
        "norm_topk_prob": normalized,
        # Theirs sums over the picks of a token, of which deepseek_v2 takes the mean.
        "router_aux_loss_coef": getattr(ffn.router, "aux_coef", 0.0) / (1 if normalized else top_k),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    return keys | ({"intermediate_size": first(config, SwiGLUConfig).hidden} if dense else {})


def ffns_of(fields: Mapping[str, Any], **settings: Any) -> list[SwiGLUConfig | MoEConfig]:
    """The FFN of every layer, as `sparse_layers` describes them."""
    step, dense = fields["decoder_sparse_step"], fields["mlp_only_layers"]
    found: list[SwiGLUConfig | MoEConfig] = []
    top_k, aux_coef = fields["num_experts_per_tok"], fields["router_aux_loss_coef"]
    for index in range(fields["num_hidden_layers"]):
        if fields["num_experts"] == 0 or index in dense or (index + 1) % step:
            found.append(SwiGLUConfig(fields["intermediate_size"]))
            continue
        router: RouterConfig
        if fields["norm_topk_prob"]:
            router = MixtralConfig(top_k=top_k, aux_coef=aux_coef)
        else:
            router = DeepSeekV2Config(top_k=top_k, aux_coef=aux_coef * top_k)
        moe = MoEConfig(
            num_experts=fields["num_experts"],
            hidden=fields["moe_intermediate_size"],
            router=router,
            **settings,
        )
        found.append(moe)
    return found


def whole_heads(config: LMConfig, kind: str) -> str | None:
    """Why a class that asks d_model to be a multiple of num_heads refuses a model, or None."""
    heads = first(config, AttentionConfig).num_heads
    if config.d_model % heads == 0:
        return None
    return f"d_model {config.d_model} is not a multiple of num_heads {heads}, which {kind} asks for"

"""Random legal combinations of all kinds, and of their settings."""

import inspect
import os
import random
from typing import Any

import torch

from configs.structure import instantiate
from models.config import LMConfig
from models.ffn.routing import RouterConfig
from models.lm import LM
from models.matrices.base import MatrixConfig
from models.slots import FFNConfig, MixerConfig
from tests.contract.tiny import SLOTS, diverges, plain

LETTERS = "ABCD"
# The seeds that the slow tests draw from; WEFT_DRAWS sets how many.
MANY = range(100, 100 + int(os.environ.get("WEFT_DRAWS", "500")))
# Other settings that a draw may give to a kind; kinds that are not here are drawn with their example alone.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention": (
        {"window": 3, "output_gate": True},
        {"qk_norm": True, "rope": "interleaved", "rope_fraction": 0.5},
        {"num_kv_heads": 1, "rope": "none"},
        {"num_heads": 4, "num_kv_heads": None, "qk_norm": True, "qkv_bias": True},
    ),
    "clipped_softmax": ({"gamma": -0.2, "zeta": 1.1, "window": 3}, {"num_kv_heads": 1, "rope": "none"}),
    "gated_attention": (
        {"gate": {"kind": "values", "activation": "silu"}, "output_gate": True, "num_kv_heads": 1},
        {"gate": {"kind": "keys", "per": "head"}, "num_kv_heads": None, "window": 3},
        {"gate": {"kind": "queries"}, "qk_norm": True},
        {"gate": {"kind": "dense"}},
        {"gate": {"kind": "slice"}},
        {"gate": {"kind": "constant", "start": 0.9}},
    ),
    "moa": ({"num_heads": 4, "window": 3}, {"qk_norm": True, "rope": "none"}),
    "persistent_memory": ({"slots": 3, "window": 3, "num_kv_heads": 1}, {"rope": "none", "output_gate": True}),
    "mla": (
        {"query_latent_dim": 5, "rope": "half", "value_dim": 3},
        {"rope": "none", "shared_dim": 3, "num_heads": 8},
    ),
    "gated_deltanet": (
        {"allow_neg_eigval": True, "output_gate": False},
        {"num_heads": 4, "conv_size": 2},
        {"num_heads": 1, "num_value_heads": 4, "conv_bias": True},
        {"expand_v": 2.0},
    ),
    "delta_net": ({"output_gate": True, "allow_neg_eigval": True}, {"num_heads": 2, "conv_size": 2}),
    "gla": (
        {"conv_size": 3, "gate_floor": -0.1},
        {"num_kv_heads": 1, "output_gate": False, "gate_normalizer": 1.0},
        {"num_heads": 2, "num_kv_heads": None, "expand_k": 0.5},
    ),
    "kda": (
        {"decay_floor": -5.0, "allow_neg_eigval": True},
        {"num_value_heads": None, "expand_v": 2.0, "gate_rank": 3},
    ),
    "retention": ({"output_gate": False, "expand_v": 1.0}, {"num_heads": 8}),
    "linear_attention": ({"feature_map": "relu"}, {"normalize": False, "num_heads": 2}),
    "based": ({"num_heads": 2, "feature_dim": 3},),
    "gsa": ({"num_kv_heads": 1, "expand_v": 2.0}, {"num_heads": 2, "num_kv_heads": None, "num_slots": 5}),
    "hgrn": ({"conv_size": 3, "expand": 1.5}, {"num_heads": None, "lower_bounds": False}),
    "hgrn2": ({"conv_size": 3}, {"num_heads": 2, "lower_bounds": False}),
    "rg_lru": ({"num_heads": 2, "expand": 1.5, "conv_size": 2},),
    "lru": ({"num_states": 24, "num_heads": 8}, {"num_heads": None, "r_min": 0.0, "max_phase": 0.3}),
    "lsh": (
        {"rounds": 1, "buckets": 2, "window": 2, "rope": "none"},
        {"rounds": 3, "buckets": 6, "window": 4, "num_heads": 8, "head_dim": 2},
    ),
    "swiglu": ({"hidden": 8},),
    "mlp": ({"activation": "relu_squared"}, {"activation": "gelu_tanh"}, {"hidden": 8, "activation": "relu"}),
    "moe": (
        {"num_experts": 8, "shared_gate": True},
        {"shared_hidden": 0, "capacity_factor": 0.8},
        {"num_experts": 6, "capacity_factor": 1.2, "capacity_group": "microbatch"},
    ),
    "mixtral": ({"stats_group": "microbatch", "z_coef": 0.01, "top_k": 3},),
    "switch": ({"jitter": 0.3, "aux_coef": 0.0},),
    "deepseek_v2": ({"top_k": 3, "scale": 2.0}, {"top_k": 2, "num_groups": 2, "aux_coef": 0.0}),
    "deepseek_v3": ({"top_k": 3, "stats_group": "microbatch"}, {"top_k": 2, "num_groups": 2, "balance_rate": 0.0}),
    "gshard": ({"random_second": False, "z_coef": 0.01},),
    "expert_choice": ({"capacity_factor": 1.0, "z_coef": 0.01},),
    "noisy_top_k": ({"load_coef": 0.0, "z_coef": 0.01}, {"top_k": 3, "stats_group": "microbatch"}),
    "v_moe": ({"top_k": 3, "importance_coef": 0.0},),
    "moe_plus_plus": (
        {"tau": 0.25, "num_zero": 2, "stats_group": "microbatch"},
        {"num_experts": 8, "num_constant": 0, "top_k": 3},
        {"num_copy": 0, "num_zero": 0, "top_k": 1, "capacity_factor": 1.1},
    ),
    "hyper": ({"streams": 2, "norm": "rms", "activation": "identity"},),
    "hyper_static": ({"streams": 1}, {"streams": 3}),
    "hyper_fractional": ({"fractions": 2, "streams": 2},),
    "desync": ({"ranks": 2}, {"ranks": 2, "every": 4}, {"ranks": 4, "every": 3}),
    "midpoint": ({"step": 0.5, "grid_bits": 40},),
    "midpoint_smoothed": ({"step": 0.5, "grid_bits": 40},),
    "mhc": ({"streams": 2, "iterations": 3},),
    "mhc_per_stream": ({"streams": 3, "iterations": 1},),
    "mhc_lite": ({"streams": 3},),
    "mudd": (
        {"separate_norms": False, "expand_last": 4},
        {"hidden_round": 16, "dilation": 2, "period": 2},
        {"window": 2, "period": 2},
    ),
    "mudd_prepost": ({"window": 1, "hidden_round": 16}, {"separate_norms": False, "dilation": 2, "period": 3}),
    "denseformer": ({"dilation": 2, "period": 2}, {"period": 3}),
    "ladder": ({"layers": [1, 2]}, {"layers": [3]}),
    "reversible": ({"grid_bits": 44}, {"grid_bits": 20}),
    "multi_split": ({"streams": 2, "grid_bits": 44}, {"streams": 5}),
    "resformer": ({"lambda1": 2.0, "lambda2": 0.3},),
    "resformer_sparse": ({"layers": [1, 2], "lambda2": 0.5},),
    "resformer_plus": ({"lambda2": 1.0},),
    "neutreno": ({"strength": -0.3},),
    "neutreno_resformer": ({"strength": 1.0, "lambda1": 0.2},),
    "value_embedding": ({"tables": 2, "lambda1": 1.0},),
    "value_embedding_gated": ({"channels": 3, "gate_range": 1.0},),
    "skip_middle": (
        {"controller": {"kind": "fixed", "mean_coef": 0.01, "var_coef": -0.01}, "key_floor": 1e-6},
        {"controller": {"kind": "l2", "middle": 0.3, "stats_group": "microbatch"}},
        {"controller": {"kind": "adaptive", "middle": 0.3, "mean_coef": 0.1}},
    ),
    "skip_middle_ungated_keys": (
        {"controller": {"kind": "proportional", "first": 0.9, "var_coef": 0.1, "stats_group": "microbatch"}},
        {"controller": {"kind": "proportional_derivative", "var_offset": 0.1}},
    ),
    "stochastic": ({"survival": 0.9},),
    "universal": ({"scale": 0.0}, {"scale": 0.1}),
    "universal_act": ({"scale": 0.1, "bias": -1.0, "eps": 0.1}, {"ponder_coef": 0.0, "bias": 0.0}),
    "completep": ({"base_width": 4, "base_layers": 8, "base_head_dim": 2, "embedding_scale": 3.0},),
    "depth_mup": ({"base_width": 32, "base_layers": 1, "logits_scale": 2.0},),
    "laurel": ({"rank": 3},),
    "laurel_rw": ({"alpha": 0.1},),
    "laurel_rw_lr": ({"rank": 3, "alpha": 0.3},),
    "laurel_pa": ({"rank": 3, "previous": 2},),
    "laurel_lr_pa": ({"rank": 3, "previous": 1},),
    "laurel_rw_lr_pa": ({"rank": 3, "previous": 3, "alpha": 0.2},),
    "pangu": ({"reduction": 16},),
}


def drawn(slot: str, kind: str, generator: random.Random) -> dict[str, Any]:
    """A kind's example, or one of its variants."""
    data = {**plain(slot, kind), **generator.choice(({}, *VARIANTS.get(kind, ())))}
    if isinstance(data.get("router"), dict):
        words = generator.getstate()[1]
        inner = random.Random(words[0] + words[-1])  # its own: what else is drawn stays as it was
        data["router"] = drawn("router", inner.choice(list(RouterConfig.kinds())), inner)
    if slot == "ffn" and "matrix" in inspect.signature(FFNConfig.of_kind(kind)).parameters:
        words = generator.getstate()[1]
        inner = random.Random(words[0] - words[-1])
        data["matrix"] = plain("matrix", inner.choice(list(MatrixConfig.kinds())))
    return data


def draw(seed: int) -> LMConfig:
    """A random combination that no rule refuses: up to four kinds of layer, every slot drawn, tied or not."""
    generator = random.Random(seed)
    while True:
        letters = LETTERS[: generator.randint(1, 4)]
        pattern = "".join(generator.choice(letters) for _ in range(generator.choice((3, 4, 4, 5, 6))))
        data: dict[str, Any] = {
            "vocab_size": 32,
            "d_model": 16,
            "pattern": pattern,
            "tie_embeddings": generator.random() < 0.3,
            "layers": {
                letter: {
                    "mixer": drawn("mixer", generator.choice(list(MixerConfig.kinds())), generator),
                    "ffn": drawn("ffn", generator.choice(list(FFNConfig.kinds())), generator),
                }
                for letter in sorted(set(pattern))
            },
        }
        for slot in SLOTS[2:]:
            data[slot.slot] = drawn(slot.slot, generator.choice(list(slot.kinds())), generator)
        if diverges({slot: data[slot]["kind"] for slot in ("norm", "depth")}):
            continue
        try:
            config = instantiate(LMConfig, data)
            with torch.device("meta"):
                LM(config)
        except ValueError:
            continue
        return config

"""What makes two models different, and what does not."""

import dataclasses

from models.compare import differences
from models.config import LayerConfig
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from models.norms.pre import PreNorm
from tests.contract import tiny


def test_equal_models() -> None:
    plain = tiny.build(ffn="moe")
    assert differences(plain, plain) == []
    spelled = dataclasses.replace(plain, pattern="AA", repeat=2)
    router = {"kind": "deepseek_v3", "top_k": 2, "aux_coef": 0.5, "z_coef": 0.1, "stats_group": "microbatch"}
    trained = tiny.build(ffn={**tiny.plain("ffn", "moe"), "router": router, "capacity_factor": 1.0})
    assert differences(spelled, trained) == []
    gated = {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 4}
    assert differences(tiny.build(mixer=gated), tiny.build(mixer={**gated, "num_value_heads": 2})) == []
    no_rope = {"kind": "attention", "num_heads": 4, "rope": "none"}
    assert differences(tiny.build(mixer=no_rope), tiny.build(mixer={**no_rope, "rope_theta": 7.0})) == []
    for kind, change in (("moe_plus_plus", {"tau": 0.5, "aux_coef": 0.0}), ("moe_plus_plus_released", {"tau": 0.5})):
        base = tiny.plain("ffn", kind)
        assert differences(tiny.build(ffn=base), tiny.build(ffn={**base, **change})) == []
    priced = {"kind": "skip_middle", "controller": {"kind": "fixed", "mean_coef": 1.0}}
    assert differences(tiny.of_kind("depth", "skip_middle"), tiny.build(depth=priced)) == []


def test_every_difference_once_and_by_its_key() -> None:
    plain = tiny.build()
    assert differences(plain, tiny.build(residual="mudd")) == [("residual.kind", "plain", "mudd")]
    heads = tiny.build(mixer={"kind": "attention", "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "window": 9})
    assert differences(plain, heads) == [("layers.A.mixer.num_heads", 8, 4), ("layers.A.mixer.window", None, 9)]
    assert differences(plain, tiny.build(num_layers=2)) == [("pattern x repeat", "4 layers", "2 layers")]
    assert [found.key for found in differences(plain, tiny.build(vocab_size=64))] == ["vocab_size"]
    layer = LayerConfig(AttentionConfig(8, 4, 4), SwiGLUConfig(24), PreNorm(eps=1e-5))
    other = dataclasses.replace(plain, layers={"A": layer})
    assert differences(other, plain) == [("layers.A.norm.eps", 1e-5, 1e-6)]

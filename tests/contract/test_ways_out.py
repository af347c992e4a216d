"""A refusal names the kinds that would do, whoever wrote them: it goes by what they declare, and knows no name."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from models.context import LayerContext
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from models.params import Axis, Normal, declare
from models.residual.plain import PlainResidual
from models.shortcuts.laurel import Laurel
from models.slots import FFN, FFNConfig, Mixer, MixerConfig
from models.values.own import OwnValues
from parallel.mesh import MeshConfig
from parallel.preflight import refuse
from tests.contract.tiny import build, plain


def way_out(mesh: MeshConfig | None = None, **fields: Any) -> str:
    """What the refusal of a model with these fields says to use."""
    with pytest.raises(ValueError) as error:
        refuse(build(**fields), mesh or MeshConfig())
    return str(error.value).partition("use ")[2]


def named(sentence: str) -> set[str]:
    """The kinds behind "such as"."""
    return set(re.split(", | or ", sentence.partition("such as ")[2]))


def test_a_mixer_that_defines_gated_keys(forget: None) -> None:
    @dataclasses.dataclass(frozen=True)
    class Gated(AttentionConfig, kind="probe_gated"):
        pass

    @dataclasses.dataclass(frozen=True)
    class Bare(AttentionConfig, kind="probe_bare"):
        key_gate = False

    said = way_out(mixer={**plain("mixer", "attention"), "kind": "probe_bare"}, depth="skip_middle")
    assert said.startswith("a mixer that does, such as ")
    assert named(said) >= {"attention", "probe_gated"} and "probe_bare" not in named(said)


def test_a_mixer_whose_heads_do_without_one_another(forget: None) -> None:
    @dataclasses.dataclass(frozen=True)
    class Alone(AttentionConfig, kind="probe_alone"):
        pass

    @dataclasses.dataclass(frozen=True)
    class Joint(AttentionConfig, kind="probe_joint"):
        by_rank = False

    said = way_out(mixer="hgrn2", residual="desync")
    assert said.startswith("a mixer whose heads do without, such as ")
    assert "probe_alone" in named(said) and "probe_joint" not in named(said)


@pytest.mark.parametrize("kind", MixerConfig.kinds())
def test_a_mixer_says_whether_its_heads_do_without_one_another(kind: str) -> None:
    with torch.device("meta"):
        mixer = build(mixer=kind).expanded[0].mixer
        assert mixer.by_rank == (type(mixer.build(build(mixer=kind).context(0))).finish is Mixer.finish)


def test_a_residual_with_one_path_and_a_shortcut_that_leaves_it(forget: None) -> None:
    @dataclasses.dataclass(frozen=True)
    class One(PlainResidual, kind="probe_one"):
        pass

    @dataclasses.dataclass(frozen=True)
    class Many(PlainResidual, kind="probe_many"):
        takes_shortcut = False

    @dataclasses.dataclass(frozen=True)
    class Idle(Laurel, kind="probe_idle"):
        active = False

    @dataclasses.dataclass(frozen=True)
    class Active(Laurel, kind="probe_active"):
        pass

    shortcut, _, residual = way_out(residual="probe_many", shortcut="probe_active").partition(", or a residual ")
    assert shortcut.startswith("a shortcut that leaves it as it is, such as ")
    assert named(shortcut) >= {"none", "probe_idle"} and "probe_active" not in named(shortcut)
    assert residual.startswith("that has one, such as ")
    assert named(residual) >= {"plain", "probe_one"} and "probe_many" not in named(residual)
    build(residual="probe_many", shortcut="probe_idle")


def test_values_that_stay_in_their_layer(forget: None) -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(OwnValues, kind="probe_own"):
        pass

    layers = {
        letter: {"mixer": {"kind": "attention", "num_heads": heads}, "ffn": plain("ffn", "swiglu")}
        for letter, heads in (("A", 2), ("B", 4))
    }
    said = way_out(layers=layers, pattern="AB", values="resformer")
    assert said.startswith("values that stay in their layer, such as ")
    assert named(said) >= {"own", "probe_own"} and "resformer" not in named(said)


def test_an_ffn_with_experts(forget: None) -> None:
    class Experts(FFN):
        def __init__(self) -> None:
            super().__init__()
            declare(self, "weight", (4, 2), Normal(1.0), axes=(Axis("experts", 4), None))

    @dataclasses.dataclass(frozen=True)
    class Some(FFNConfig, kind="probe_experts"):
        def build(self, ctx: LayerContext) -> FFN:
            return Experts()

    @dataclasses.dataclass(frozen=True)
    class Wide(FFNConfig, kind="probe_wide"):
        def build(self, ctx: LayerContext) -> FFN:
            raise ValueError(f"d_model is {ctx.d_model}")

    @dataclasses.dataclass(frozen=True)
    class Dense(SwiGLUConfig, kind="probe_dense"):
        pass

    said = way_out(MeshConfig(dp=2, ep=2))
    assert said.startswith("ep=1, or an ffn with experts, such as ")
    assert named(said) >= {"moe", "moe_plus_plus", "probe_experts"}
    assert named(said).isdisjoint({"swiglu", "probe_dense", "probe_wide"})


def test_no_kind_would_do() -> None:
    assert FFNConfig.such_as(lambda kind: False) == ""
    assert FFNConfig.such_as(lambda kind: kind.kind == "moe") == ", such as moe"

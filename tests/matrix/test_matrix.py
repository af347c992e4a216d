"""The matrix: on every mesh a step equals one process's: loss, every gradient, statistics, updated parameters."""

import random
from typing import Any

import pytest
import torch

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.slots import MixerConfig
from parallel import check
from parallel.engine import Engine
from parallel.mesh import CONTEXTS, Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.draws import MANY, draw
from tests.contract.tiny import HYBRID, build, describe, every_kind, of_kind, plain
from tests.matrix.meshes import EVERYDAY, MESHES
from tests.slow import in_turn, slow

COMBINATIONS: dict[str, LMConfig] = {
    "hybrid": build(**HYBRID, residual="hyper", values="resformer_learnable", norm="peri", tie_embeddings=True),
    "mudd": build(**HYBRID, residual="mudd", values="resformer", depth="skip_middle"),
    "ladder": build(**HYBRID, residual="ladder", norm="post", scaling="rezero", tie_embeddings=True),
    "reversible": build(residual={"kind": "reversible", "grid_bits": 44}, depth="skip_middle", ffn="moe"),
    "desync": build(**HYBRID, residual={"kind": "desync", "ranks": 4, "every": 3}),
    "desync_block": build(
        mixer="mla",
        ffn={**plain("ffn", "moe"), "shared_gate": True, "capacity_factor": 0.9, "capacity_group": "microbatch"},
        residual={"kind": "desync", "ranks": 4},
        depth={"kind": "universal_act", "scale": 0.1, "bias": -1.0},
    ),
    "one_kv_head": build(
        mixer={"kind": "attention", "num_heads": 8, "num_kv_heads": 1, "head_dim": 4, "qk_norm": True}
    ),
    "two_kv_heads": build(
        mixer={"kind": "attention", "num_heads": 8, "num_kv_heads": 2, "head_dim": 4, "window": 5}, values="resformer"
    ),
    "experts_on_one_stage": build(
        pattern="DDMD",
        repeat=1,
        tie_embeddings=True,
        layers={
            "D": {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "swiglu")},
            "M": {"mixer": plain("mixer", "gated_deltanet"), "ffn": plain("ffn", "moe")},
        },
    ),
    "heads_of_a_larger_model": build(
        mixer={**plain("mixer", "moa"), "num_heads": 4},
        scaling={**plain("scaling", "completep"), "base_head_dim": 2},
    ),
    "bounds_of_all_layers": build(
        6, mixer="hgrn2", ffn="mlp", residual="hyper_static", shortcut="pangu", tie_embeddings=True
    ),
    "microbatch_statistics": build(
        ffn={
            **plain("ffn", "moe"),
            "router": {"kind": "mixtral", "stats_group": "microbatch", "z_coef": 0.01},
            "capacity_factor": 0.8,
            "capacity_group": "microbatch",
        }
    ),
}


LADDER = build(residual="ladder", ffn="moe", values="resformer")  # whose sums can be under way


def assert_equal(config: LMConfig, mesh: str, pool: Pool, settings: check.Settings | None = None) -> None:
    report = check.run(config, MeshConfig.parse(mesh), settings, pool, timeout=120)
    assert report.ok, "\n".join([describe(config), f"on {mesh}", *report.wrong[:10]])


@pytest.mark.parametrize(
    ("slot", "kind", "mesh"),
    [(*kind, EVERYDAY[turn % len(EVERYDAY)]) for turn, kind in enumerate(every_kind())],
)
def test_every_kind(slot: str, kind: str, mesh: str, pool: Pool) -> None:
    """An everyday mesh each, in turn, to keep this short; the slow test has them all."""
    assert_equal(of_kind(slot, kind), mesh, pool)


def test_tokens_stop_at_different_steps() -> None:
    """In the model whose meshes are compared: where all ran as often, nothing would say that gates are right."""
    config, settings, mesh = of_kind("depth", "universal_act"), check.Settings(), MeshConfig()
    count = check.micro_batches(mesh, settings)
    batch = check.make_batch(config, mesh, settings)
    engine = Engine(config, Mesh.single(), seed=settings.seed, dtype=torch.float64)
    found = check.take_step(engine, batch, count, None, settings).statistics
    steps = [int(found[f"layers.{index}.depth.steps"]) for index in range(4)]
    stopped = [now - after for now, after in zip(steps, [*steps[1:], 0], strict=True)]
    assert sum(count > 0 for count in stopped) > 1, steps


@pytest.mark.parametrize("kind", sorted(MixerConfig.kinds()))
def test_every_mixer_in_place(kind: str, pool: Pool) -> None:
    """Stretches of three tokens: documents begin with some of them, and convolutions see further back. And rows that
    are one document each, without padding."""
    assert_equal(of_kind("mixer", kind), "cp=4,context=ring", pool)
    assert_equal(of_kind("mixer", kind), "cp=2,context=ring", pool, check.Settings(length=16, packed=False))


def everyday(mesh: str) -> bool:
    """Of the meshes of eight ranks, two, to keep this short."""
    chosen = ("fsdp=2,tp=2,pp=2", "fsdp=2,cp=2,pp=2,schedule=dualpipev")
    return mesh in chosen or MeshConfig.parse(mesh).world_size < 8


@pytest.mark.parametrize("mesh", [*filter(everyday, MESHES), *slow(mesh for mesh in MESHES if not everyday(mesh))])
def test_every_mesh(mesh: str, pool: Pool) -> None:
    assert_equal(LADDER if MeshConfig.parse(mesh).overlap else COMBINATIONS["hybrid"], mesh, pool)


@pytest.mark.parametrize(
    ("mesh", "name"),
    in_turn(("tp=4", "tp=2", "tp=8", "cp=2,tp=4", "fsdp=2,tp=4", "tp=2,pp=2", "cp=4"), ("two_kv_heads", "one_kv_head")),
)
def test_fewer_key_value_heads_than_ranks(mesh: str, name: str, pool: Pool) -> None:
    assert_equal(COMBINATIONS[name], mesh, pool)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev", "zero_bubble"])
def test_a_parameter_that_joins_groups_of_others(schedule: str, pool: Pool) -> None:
    """Six layers share one parameter, whose paths through a stage meet those of several groups (see
    `parallel.split_backward`)."""
    assert_equal(build(6, mixer="hgrn2"), f"pp=2,schedule={schedule}", pool)


@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2,tp=2", "cp=2", "ep=4,cp=2", "dp=2,pp=2,schedule=interleaved"])
def test_statistics_over_a_micro_batch(mesh: str, pool: Pool) -> None:
    assert_equal(COMBINATIONS["microbatch_statistics"], mesh, pool)


@pytest.mark.parametrize("mesh", ["fsdp=2,pp=2", "fsdp=2,tp=2,pp=2,schedule=interleaved", "ep=2,pp=4"])
def test_stages_without_experts(mesh: str, pool: Pool) -> None:
    """Every rank makes the same groups, whatever its stage holds."""
    assert_equal(COMBINATIONS["experts_on_one_stage"], mesh, pool)


@pytest.mark.parametrize("mesh", ["fsdp=2,tp=2,pp=2", "cp=2,tp=2", "pp=2,schedule=dualpipev"])
@pytest.mark.parametrize("name", ["mudd", "ladder", "reversible"])
def test_combinations(name: str, mesh: str, pool: Pool) -> None:
    assert_equal(COMBINATIONS[name], mesh, pool)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("heads_of_a_larger_model", "tp=2"), ("bounds_of_all_layers", "pp=2,schedule=dualpipev")],
)
def test_what_random_combinations_found(name: str, mesh: str, pool: Pool) -> None:
    assert_equal(COMBINATIONS[name], mesh, pool)


@pytest.mark.parametrize(
    ("name", "mesh"), [("desync", "ep=2,tp=2"), ("desync", "cp=2,tp=2"), ("desync_block", "ep=2,fsdp=2,tp=2,pp=2")]
)
def test_streams_of_ranks_with_experts(name: str, mesh: str, pool: Pool) -> None:
    """Ranks that share experts send rows that are for other parts of them."""
    assert_equal(COMBINATIONS[name], mesh, pool)


@pytest.mark.parametrize(
    "settings",
    [
        check.Settings(length=16, packed=False, sequences=2),
        check.Settings(length=7, micro_batches=8),
        check.Settings(length=65, seed=3),
    ],
    ids=["whole_rows", "short_rows", "long_rows"],
)
def test_other_batches(settings: check.Settings, pool: Pool) -> None:
    assert_equal(COMBINATIONS["hybrid"], "fsdp=2,tp=2,pp=2,schedule=interleaved", pool, settings)


def random_mesh(generator: random.Random, config: LMConfig) -> MeshConfig:
    """A mesh of 2 to 8 ranks that the config is not refused on."""
    while True:
        degrees: dict[str, Any] = {
            key: generator.choice((1, 1, 2, 4)) for key in ("dp", "fsdp", "tp", "cp", "ep", "etp", "pp")
        }
        # Refused on most meshes: with experts, in a model with some, and on tensor ranks with a plain ladder.
        degrees |= {key: generator.choice((1, 2)) for key in ("ep_local", "ep_chunks") if degrees["ep"] > 1}
        degrees["overlap"] = degrees["tp"] > 1 and generator.random() < 0.5
        try:
            mesh = MeshConfig(
                **degrees,
                schedule=generator.choice(("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")),
                context=generator.choice(CONTEXTS),
                reshard=generator.random() < 0.7,
            )
            if 2 <= mesh.world_size <= 8:
                check.refuse_combination(config, mesh, check.Settings())
                return mesh
        except ValueError:
            continue


def check_draw(seed: int, pool: Pool) -> None:
    generator = random.Random(seed)
    config = draw(seed)
    mesh = random_mesh(generator, config)
    settings = check.Settings(seed=seed, length=generator.choice((5, 13, 19)), packed=generator.random() < 0.7)
    assert_equal(instantiate(LMConfig, to_plain(config)), str(mesh), pool, settings)


@pytest.mark.parametrize("seed", [*range(4), *slow((4, 5))])
def test_random_combinations(seed: int, pool: Pool) -> None:
    check_draw(seed, pool)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_many_random_combinations(seed: int, pool: Pool) -> None:
    check_draw(seed, pool)

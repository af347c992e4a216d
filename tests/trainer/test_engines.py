"""DeepSpeed and Accelerate against the native engine: losses, norms, every parameter, AdamW's state, runs and resumes.

The packages keep process groups in globals, so that each test has processes of its own.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LayerConfig, LMConfig
from models.ffn.moe import MoEConfig
from models.memory.base import MemoryConfig
from models.mixers.attention import AttentionConfig
from parallel.check import Settings, make_batch, shaken, share
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.trainer import runs
from trainer.config import RunConfig
from trainer.engines.base import EngineConfig
from trainer.optim.groups import GroupConfig

packages = pytest.mark.skipif(
    not (importlib.util.find_spec("deepspeed") and importlib.util.find_spec("accelerate")),
    reason="the packages of weft[engines] are not installed",
)
NATIVE: dict[str, Any] = {"kind": "native"}
ACCELERATE: dict[str, Any] = {"kind": "accelerate"}
ZERO: list[dict[str, Any]] = [
    {"kind": "deepspeed", "stage": 1},
    {"kind": "deepspeed", "stage": 2},
    {"kind": "deepspeed", "stage": 2, "offload": "optimizer"},
    # Small parameters stay whole by default, and here all are small.
    {"kind": "deepspeed", "stage": 3, "keep_below": 0},
    {"kind": "deepspeed", "stage": 3, "keep_below": 300, "offload": "all"},
]
STEPS = 4
# Sums of some hundred float32 terms in another order, through a few steps of an AdamW whose eps does not blow up
# gradients that are nothing but rounding: 100 x 2^-24. bfloat16 is 2^16 times as coarse, and a step's gradient is
# rounded once more where ZeRO adds it up.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.2}


def model() -> LMConfig:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    ffn = instantiate(
        MoEConfig, {"num_experts": 4, "hidden": 12, "router": {"kind": "deepseek_v3", "top_k": 2, "aux_coef": 0.01}}
    )
    return LMConfig(61, 17, {"A": LayerConfig(attention, ffn)}, "AA", tie_embeddings=True)


def run_config(folder: Path, dtype: str, **changes: Any) -> RunConfig:
    """A run without data, of 2 micro-batches on each of 2 ranks."""
    config = runs.run_config(folder, folder, MeshConfig(dp=2), micro_batch=2, global_batch=8, dtype=dtype)
    groups = (GroupConfig("embedding", 0.5, weight_decay=0.0), GroupConfig("router", 2.0))
    config = runs.with_optim(config, eps=1e-3, weight_decay=0.3, clip=0.5, groups=groups)
    return dataclasses.replace(config, **{"model": model(), **changes})


@dataclasses.dataclass
class Steps:
    """losses, norms: of each step. held: what a checkpoint would hold. elements: of
    weights, on this rank between steps."""

    losses: list[tuple[float, float]]
    norms: list[float]
    held: dict[str, Tensor]
    elements: int


def take_steps(config: RunConfig, mesh: Mesh) -> Steps:
    """From shaken weights, with one step's gradients dropped and an evaluation in between."""
    engine, optimizer = config.engine.build(config, mesh)
    initial = engine.full_state()
    engine.load_full_state(shaken(initial, 3))
    found = Steps([], [], {}, 0)
    for step in range(STEPS):
        settings = Settings(seed=step, length=11, sequences=2, micro_batches=2)
        whole = make_batch(config.model, config.mesh, settings)
        batch = share(whole, 2, mesh.data_rank, mesh.data_size)
        if step == 2:
            engine.step_gradients(share(whole, 2, 0, 2), 2)
            evaluated = engine.evaluate(batch)[0]
        else:
            evaluated = 0.0
        out = engine.step_gradients(batch, 2)
        norm = engine.grad_norm()
        assert config.optim.clip is not None
        engine.clip(config.optim.clip, norm)
        optimizer.step(config.optim.lr * (1 + step))
        engine.after_step(out.stats)
        found.losses.append((float(out.loss), evaluated))
        found.norms.append(float(norm))
    found.elements = sum(held.parameter.numel() for held in engine.held())
    found.held = {name: piece.on_host().local for name, piece, _ in engine.pieces(optimizer.state)}
    found.held |= {f"initial/{name}": value for name, value in initial.items()}
    return found


def announce() -> Mesh:
    """Tell Accelerate of this process what a launcher would."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    return Mesh(MeshConfig(dp=int(world)))


def take_all(config: RunConfig, engines: list[dict[str, Any]], memories: list[dict[str, Any]]) -> list[Steps]:
    """The steps by every engine, under every memory."""
    mesh, found = announce(), []
    for engine in engines:
        for memory in memories:
            own = dataclasses.replace(
                config, engine=instantiate(EngineConfig, engine), memory=instantiate(MemoryConfig, memory)
            )
            own.engine.refuse(own)
            found.append(take_steps(own, mesh))
    return found


def errors(got: Steps, expected: Steps) -> dict[str, float]:
    """Of everything, relative to its largest element."""
    assert got.held.keys() == expected.held.keys()
    pairs = {name: (value, expected.held[name]) for name, value in got.held.items()}
    pairs["losses"] = torch.tensor(got.losses), torch.tensor(expected.losses)
    pairs["norms"] = torch.tensor(got.norms), torch.tensor(expected.norms)
    return {
        name: float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for name, (a, b) in pairs.items()
    }


def wrong(got: Steps, expected: Steps, tolerance: float) -> dict[str, float]:
    return {name: error for name, error in errors(got, expected).items() if not error <= tolerance}


NO_MEMORY: list[dict[str, Any]] = [{"kind": "none"}]


@packages
def test_every_engine_takes_the_steps_of_the_native_one(tmp_path: Path) -> None:
    """Accumulation, packed documents, padding, uneven tokens, clipping, decay, groups, experts with balanced biases."""
    config = run_config(tmp_path, "float32")
    engines = [NATIVE, ACCELERATE, *ZERO]
    with Pool(2) as pool:
        ranks = pool.run(take_all, 2, config, engines, NO_MEMORY, timeout=250)
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=4))
    native = ranks[0][0]
    assert not wrong(take_steps(alone, Mesh.single()), native, TOLERANCES["float32"])
    for engine, steps, others in zip(engines, *ranks, strict=True):
        assert not wrong(steps, native, TOLERANCES["float32"]), engine
        assert not wrong(others, native, TOLERANCES["float32"]), engine
        for name in model_names(native):
            assert torch.equal(steps.held[f"initial/{name}"], native.held[f"initial/{name}"]), (engine, name)
    assert ranks[0][engines.index(ZERO[3])].elements == 0 < native.elements
    assert 0 < ranks[0][engines.index(ZERO[4])].elements < native.elements


def model_names(steps: Steps) -> list[str]:
    return [name.removeprefix("model/") for name in steps.held if name.startswith("model/")]


@packages
@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_other_types(tmp_path: Path, dtype: str) -> None:
    """Accelerate is exact in all; ZeRO has no float64, and in bfloat16 the same float32 weights at first."""
    engines = [NATIVE, ACCELERATE] if dtype == "float64" else [NATIVE, ACCELERATE, ZERO[1], ZERO[3]]
    with Pool(2) as pool:
        native, accelerate, *zero = pool.run(take_all, 2, run_config(tmp_path, dtype), engines, NO_MEMORY, timeout=250)[
            0
        ]
    assert not wrong(accelerate, native, 1e-12 if dtype == "float64" else 1e-5)
    for steps in zero:
        assert not wrong(steps, native, TOLERANCES[dtype])
        assert all(value.dtype == torch.float32 for value in steps.held.values())
        for name in model_names(native):
            assert torch.equal(steps.held[f"initial/{name}"], native.held[f"initial/{name}"]), name
        assert abs(steps.losses[0][0] - native.losses[0][0]) <= 1e-3 * native.losses[0][0]


@packages
@pytest.mark.slow
def test_memories(tmp_path: Path) -> None:
    kinds = ["full", "selective", "sqrt", "offload", "reversible"]
    undone = {**to_plain(runs.model()), "residual": {"kind": "reversible"}}
    config = runs.with_optim(run_config(tmp_path, "float32", model=instantiate(LMConfig, undone)), groups=())
    memories = [{"kind": kind} for kind in kinds]
    with Pool(2) as pool:
        native = pool.run(take_all, 2, config, [NATIVE], NO_MEMORY)[0][0]
        found = pool.run(take_all, 2, config, [ACCELERATE, ZERO[1], ZERO[3]], memories, timeout=280)[0]
    assert not [errors for steps in found if (errors := wrong(steps, native, 1e-4))]

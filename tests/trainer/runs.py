"""Tiny runs for the tests; importable by the worker processes."""

import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.config import LayerConfig, LMConfig
from models.ffn.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from parallel.mesh import Mesh, MeshConfig
from trainer import metrics
from trainer.config import DataConfig, OutputConfig, RunConfig, TrainConfig
from trainer.data.prepare import PrepareConfig, prepare
from trainer.data.tokenizers.sentencepiece import TokenizerConfig
from trainer.loop import Launch, train
from trainer.optim.adamw import AdamWConfig
from trainer.schedule.decay import Cosine
from trainer.state import RunState

VOCAB = 320
WORDS = "warp weft thread loom shuttle fabric pattern selvedge bobbin heddle reed treadle tapestry spindle".split()


def prepare_data(folder: Path) -> Path:
    """A few KB of sentences, prepared."""
    (folder / "text").mkdir(parents=True)
    draw = random.Random(0)
    for i in range(30):
        text = "".join(f"the {draw.choice(WORDS)} {draw.choice(WORDS)} of {draw.choice(WORDS)}.\n" for _ in range(12))
        (folder / "text" / f"{i:02}.txt").write_text(text)
    prepare(PrepareConfig((str(folder / "text"),), TokenizerConfig(VOCAB), valid_bytes=700), folder / "data")
    return folder / "data"


def model() -> LMConfig:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    return LMConfig(VOCAB, 16, {"A": LayerConfig(attention, SwiGLUConfig(hidden=32))}, "AA")


def run_config(data: Path, folder: Path, mesh: MeshConfig | None = None, **train_: Any) -> RunConfig:
    """A run of 6 steps of 4 sequences."""
    settings: dict[str, Any] = {"steps": 6, "global_batch": 4, "micro_batch": 2, "save_every": 2, **train_}
    return RunConfig(
        model(),
        OutputConfig(str(folder), seed=1),
        DataConfig(24, str(data / "train"), valid=str(data / "valid")),
        TrainConfig(**settings),
        AdamWConfig(lr=0.01),
        Cosine(warmup=2),
        mesh or MeshConfig(),
    )


def run(config: RunConfig, launch: Launch | None = None, mesh: Mesh | None = None) -> tuple[RunState, str]:
    """Train; returns where it ended and what was printed."""
    out = io.StringIO()
    torch.manual_seed(0)
    state = train(config, mesh or Mesh(config.mesh), launch, Console(file=out, width=200))
    return state, out.getvalue()


def run_on_threads(threads: int, config: RunConfig) -> None:
    """Train as a process with that many threads does, on which the order of sums depends."""
    torch.set_num_threads(threads)
    run(config)


def run_interrupted(config: RunConfig, stop_after: int) -> list[dict[str, float]]:
    """Train to a step, then resume to the end; returns the records."""
    mesh = Mesh(config.mesh)
    run(config, Launch(stop_after=stop_after), mesh)
    run(config, None, mesh)
    return records(config)


def run_to(config: RunConfig, step: int) -> None:
    run(config, Launch(stop_after=step), Mesh(config.mesh))


def run_through(config: RunConfig) -> list[dict[str, float]]:
    run(config, None, Mesh(config.mesh))
    return records(config)


def records(config: RunConfig) -> list[dict[str, float]]:
    """All records, without what depends on the machine."""
    machine = {"train/tokens_per_second", "train/mfu", "train/memory_gib", "train/data_wait"}
    found = metrics.read(Path(config.run.dir))
    return [{name: value for name, value in record.items() if name not in machine} for record in found]


def with_optim(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))

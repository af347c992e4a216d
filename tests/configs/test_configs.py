"""Every shipped YAML file can be run, and the debug ones show every plug-in."""

from pathlib import Path

import pytest
import torch

from configs.load import load
from configs.structure import slots_in, to_plain
from configs.text import dump_yaml, parse_yaml
from configs.validate import parse
from launch.runs import load_run
from models.lm import LM
from models.params import initialize
from models.plugin import plugins_in
from trainer.config import RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
# Billions of parameters, to the digits that their authors give.
PUBLISHED = {
    "mixtral_8x7b": "46.7",
    "deepseek_v2_lite": "15.7",
    "deepseek_v3": "671",
    "moe_plus_plus_0b6": "0.6",
    "moe_plus_plus_1b": "1",
    "moe_plus_plus_2b": "2",
    "llama_7b": "6.7",
    "hyper_olmo_1b": "1.18",
    "hyper_static_olmo_1b": "1.177",
    "hyper_olmo_7b": "6.9",
    "hyper_olmoe_1b_7b": "6.92",
    "hyper_fractional_olmoe_7b": "6.919",
    "mhc_3b": "2.97",
    "mhc_27b": "27.0",
    "denseformer_48": "0.378",
    "mudd_2b8": "2.8",
    "ladder_hybrid_8b": "8.03",
    "parallel_gptj_6b": "6.05",
    "post_olmo2_7b": "7.30",
    "parallel_palm_8b": "8.63",
    "parallel_pythia_1b4": "1.41",
    "parallel_neox_20b": "20.55",
}
DEBUG = [path for path in FILES if path.name.startswith(("debug_", "task_"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file(path: Path) -> None:
    config = load_run(str(path))  # builds the model on the meta device
    assert parse(RunConfig, parse_yaml(dump_yaml(to_plain(config)), "written")) == config


@pytest.mark.parametrize("path", DEBUG, ids=lambda path: path.stem)
def test_debug_file_steps(path: Path) -> None:
    config: RunConfig = parse(RunConfig, load(path))
    assert config.run.dir == f"runs/{path.stem}", "runs of two configs must not meet in one folder"
    model = LM(config.model)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(config.model.vocab_size, (2, 2, 16), generator=generator)
    out = model(tokens, targets, keys_B=torch.arange(2))
    assert out.loss is not None and out.count == targets.numel()
    (out.loss / out.count).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path not in DEBUG], ids=lambda path: path.stem)
def test_large_file_steps_on_the_meta_device(path: Path) -> None:
    """Shapes only, in the type that experts are made for, and of rows of a few chunks."""
    config = load_run(str(path))
    with torch.device("meta"):
        model = LM(config.model).to(torch.bfloat16)
        tokens = torch.empty(config.train.micro_batch, min(config.data.sequence_length, 128), dtype=torch.int64)
        out = model(tokens, tokens, keys_B=torch.empty(config.train.micro_batch, dtype=torch.int64))
    assert out.loss is not None and out.count is not None
    (out.loss / out.count).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in PUBLISHED], ids=lambda path: path.stem)
def test_large_file_has_the_parameters_that_were_published(path: Path) -> None:
    billions = PUBLISHED[path.stem]
    with torch.device("meta"):
        model = LM(load_run(str(path)).model)
    digits = len(billions.partition(".")[2])
    assert f"{sum(p.numel() for p in model.parameters()) / 1e9:.{digits}f}" == billions


def shown(paths: list[Path]) -> set[tuple[str, str]]:
    return {(p.slot, p.kind) for path in paths for p in plugins_in(parse(RunConfig, load(path)))}


def shipped(folders: tuple[str, ...]) -> set[tuple[str, str]]:
    return {
        (base.slot, kind)
        for base in slots_in(RunConfig)
        for kind, cls in base.kinds().items()
        if cls.__module__.startswith(folders)
    }


def test_every_kind_has_a_debug_file() -> None:
    assert shipped(("models.", "trainer.")) - shown(DEBUG) == set(), "write configs/debug_<kind>.yaml"


def test_every_architecture_has_a_file_at_scale() -> None:
    large = shown([path for path in FILES if path not in DEBUG])
    # Of the gates of one mixer, one of each paper stands for all; memory is none's business but a run's.
    architectures = {kind for kind in shipped(("models.",)) if kind[0] not in ("attention_gate", "memory")}
    assert architectures - large == set(), "write configs/paper/<kind>_<size>.yaml"

"""Weights that a run starts from: those of another run, or of a model that `weft import` brought in."""

from collections.abc import Callable
from pathlib import Path

from configs.errors import at
from configs.structure import instantiate
from models.compare import differences, said
from models.config import LMConfig
from parallel.engine import Engine
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data import fitting
from trainer.data.tokenizer import Tokenizer
from trainer.resume import load, on_main


def find(folder: str, warn: Callable[[str], None], hashes: bool = True) -> Path:
    """The newest whole checkpoint of a run's folder, or the one that `folder` is. Raises ValueError where none is."""
    try:
        return checkpoint.choose(Path(folder), warn, hashes)
    except ValueError as error:
        raise at("run.init_from", str(error)) from error


def refuse_other(config: RunConfig, path: Path) -> None:
    """Raise ValueError unless the checkpoint's weights are weights of this run's model."""
    theirs: LMConfig = instantiate(LMConfig, checkpoint.read(path).config["model"])
    for key, ours, other in differences(config.model, theirs)[:1]:
        raise ValueError(
            f"model.{key} is {said(ours)}, and {said(other)} in {path}, from which run.init_from takes the weights; "
            "use the same model, or leave run.init_from out"
        )


def refuse_initial(config: RunConfig) -> None:
    """Before any process starts: raise ValueError where `start` would, unless the run goes on from its own state."""
    if config.run.init_from is None or checkpoint.steps(Path(config.run.dir) / checkpoint.FOLDER):
        return
    path = find(config.run.init_from, lambda _: None, hashes=False)
    refuse_other(config, path)
    tokenizer = checkpoint.read(path).config["data"].get("tokenizer")
    if tokenizer is not None and Path(tokenizer).exists():
        for prefix in config.data.weights:
            fitting.refuse_other(prefix, Tokenizer.load(tokenizer), tokenizer)


def start(config: RunConfig, engine: Engine, warn: Callable[[str], None]) -> Path | None:
    """Replace a fresh model's weights by those that run.init_from names, on any mesh (a collective).

    Returns the checkpoint, or None where the run names none. Raises ValueError for another model's.
    """
    folder = config.run.init_from
    if folder is None:
        return None
    path = on_main(engine.mesh.is_main, lambda: find(folder, warn))
    refuse_other(config, path)
    load(path, engine)
    return path

"""One evaluation as it is asked for: of a run, a checkpoint or an exported folder, on text or on prepared data."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from configs.structure import instantiate
from models.hf.folder import is_exported, read_config
from models.limits import at_least
from parallel.mesh import MeshConfig
from trainer import checkpoint, kernels
from trainer.config import RunConfig
from trainer.data.fitting import fitting_stream, fitting_tokenizer
from trainer.data.sequences import Sequences
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer
from trainer.evaluate import Evaluates, Evaluation, evaluate
from trainer.exported import Exported
from trainer.process import build_engine, joined
from trainer.progress import counting, say
from trainer.resume import load, on_main
from trainer.whereabouts import Whereabouts

# Sequences at once of a model whose folder does not say.
MICRO_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    model: folder of a run, a checkpoint or an export. texts: files, folders, globs, instead of `data`, the prefix of a
    .bin/.idx pair (default: the run's data.valid). text_key: where JSON lines and Parquet have their text. tokenizer:
    default the model's own. window: tokens of a sequence (default: as trained). stride: new tokens of each (default:
    window). limit: sequences. micro_batch: sequences at once on a data rank. trust: run an export's code, whatever it
    is.
    """

    model: Path
    texts: tuple[str, ...] = ()
    data: str | None = None
    text_key: str = "text"
    tokenizer: str | None = None
    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    micro_batch: int | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "window", "stride", "limit", "micro_batch")
        if self.texts and self.data is not None:
            raise ValueError(f"both text ({self.texts[0]}) and --data {self.data} are given; evaluate one at a time")
        if self.data is not None and Path(self.data).is_file():
            raise ValueError(f"--data {self.data} is a file; give text without --data, or a prefix without its ending")

    def sizes(self, trained: int | None) -> tuple[int, int]:
        """Window and stride. Raises ValueError where none is known, or the stride leaves tokens out."""
        window = self.window or trained
        if window is None:
            raise ValueError(f"{self.model} does not say how long its sequences are; give --window, such as 1024")
        stride = self.stride or window
        if stride > window:
            raise ValueError(
                f"stride is {stride} and the window {window}, which would leave tokens out; use at most {window}"
            )
        return window, stride

    def prefix(self, config: RunConfig) -> str:
        """Of the prepared data. Raises ValueError where there are none."""
        found = self.data or config.data.valid
        if found is None:
            raise ValueError("the run has no data.valid; name text files to evaluate on, or data with --data PREFIX")
        return found

    def stream(
        self, prefix: str | None, tokenizer: str | None, vocab_size: int, console: Console, is_main: bool = True
    ) -> tuple[Stream, Tokenizer | None]:
        """What is evaluated on, and what decodes it (a collective). tokenizer: the model's own."""
        named = self.tokenizer or tokenizer
        if not self.texts:
            assert prefix is not None
            return fitting_stream(prefix, str(self.model), vocab_size, named)
        own = fitting_tokenizer(named, str(self.model), vocab_size)
        return from_main(is_main, lambda: Stream.encode(self.texts, self.text_key, own, console)), own


@dataclasses.dataclass(frozen=True)
class Report:
    """model: the folder that was evaluated. data: what on."""

    model: str
    data: str
    window: int
    stride: int
    result: Evaluation

    def as_dict(self) -> dict[str, object]:
        where = {"model": self.model, "data": self.data, "window": self.window, "stride": self.stride}
        return {**self.result.as_dict(), **where}

    def __str__(self) -> str:
        bits = self.result.bits_per_byte
        return (
            f"{self.model}: loss {self.result.loss:.4f} nats per token, perplexity {self.result.perplexity:.2f}, "
            f"{'unknown' if bits is None else f'{bits:.4f}'} bits per byte, over {self.result.tokens:,} tokens of "
            f"{self.data}, window {self.window}, stride {self.stride}"
        )


def run(request: Request, mesh: str | None = None) -> Report:
    """Evaluate (a collective). mesh: such as dp=2; default the run's under torchrun, otherwise one process.

    Raises ValueError, one sentence, for what cannot be evaluated.
    """
    main = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not main, force_terminal=None if main else False)
    if is_exported(request.model):
        refuse_mesh(request.model, mesh)
        return run_exported(request, console)

    def warn(text: str) -> None:
        say(console, f"weft: warning: {text}")

    path = checkpoint.choose(request.model, warn)
    config: RunConfig = instantiate(RunConfig, checkpoint.read(path).config)
    sizes = request.sizes(config.data.sequence_length)
    prefix = None if request.texts else request.prefix(config)
    degrees = config.mesh if "WORLD_SIZE" in os.environ else MeshConfig()
    if mesh is not None:
        degrees = MeshConfig.parse(mesh)
    with joined(degrees, config.train.timeout, Whereabouts("evaluation")) as group:
        vocab_size = config.model.vocab_size
        stream, tokenizer = request.stream(prefix, config.data.tokenizer, vocab_size, console, group.is_main)
        engine = build_engine(config, group)
        kernels.choose_again(config, engine, warn)
        load(path, engine)
        micro_batch = request.micro_batch or config.train.micro_batch
        result = score(engine, Sequences(stream, *sizes), micro_batch, request.limit, tokenizer, console)
    return Report(str(path), stream.name, *sizes, result)


def run_exported(request: Request, console: Console) -> Report:
    """Evaluate an exported folder, in this process."""
    described = read_config(request.model)
    sizes = request.sizes(described.get("max_position_embeddings"))
    if not request.texts and request.data is None:
        raise ValueError(
            f"{request.model} is an export, which has no data; name text files to evaluate on, or --data PREFIX"
        )
    stream, tokenizer = request.stream(
        request.data, own_tokenizer(request.model), described.get("vocab_size", 0), console
    )
    model = Exported(request.model, request.trust)
    micro_batch = request.micro_batch or MICRO_BATCH
    result = score(model, Sequences(stream, *sizes), micro_batch, request.limit, tokenizer, console)
    return Report(str(request.model), stream.name, *sizes, result)


def score(
    model: Evaluates,
    sequences: Sequences,
    micro_batch: int,
    limit: int | None,
    tokenizer: Tokenizer | None,
    console: Console,
) -> Evaluation:
    """`evaluate` with progress, and how much text it was. tokenizer: tells that where no manifest does."""
    total = min(len(sequences), limit or len(sequences))
    with counting(console, "evaluating sequences", total) as advance:
        result = evaluate(model, sequences, micro_batch, limit, advance)
    return dataclasses.replace(result, bytes=sequences.stream.text_bytes(sequences.predicted(total), tokenizer))


def from_main(is_main: bool, make: Callable[[], Stream]) -> Stream:
    """Made on rank 0 and sent to all; every rank raises what that one raised (a collective)."""
    made: list[Any] = []
    on_main(is_main, lambda: made.append(make()))
    if dist.is_initialized():
        made = made or [None]
        dist.broadcast_object_list(made)
    return made[0]


def own_tokenizer(folder: Path) -> str | None:
    """Of an exported folder."""
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def refuse_mesh(folder: Path, mesh: str | None) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if mesh is None else MeshConfig.parse(mesh).world_size
    if ranks > 1:
        raise ValueError(
            f"{folder} is an export, which runs on one process, not on {ranks}; evaluate the run on a mesh instead"
        )

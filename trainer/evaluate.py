"""`python -m trainer.evaluate RUN`: loss, perplexity and bits per byte of held-out data, every token predicted once."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.structure import instantiate
from parallel.engine import Engine
from parallel.mesh import MeshConfig
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data.manifest import read_manifest
from trainer.data.sequences import Sequences, on_device
from trainer.process import build_engine, joined
from trainer.resume import load


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss_sum: the cross-entropy of all targets, in nats. bytes: of the text that the targets are, if known."""

    loss_sum: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Independent of the tokenizer; the ends of documents are predicted too, but have no bytes."""
        return None if self.bytes is None else self.loss_sum / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate(engine: Engine, sequences: Sequences, micro_batch: int, limit: int | None = None) -> Evaluation:
    """Evaluate all sequences, or the first `limit` (a collective). micro_batch: sequences per data rank at once."""
    mesh = engine.mesh
    count = len(sequences) if limit is None else min(limit, len(sequences))
    across = mesh.data_size * micro_batch
    loss_sum, tokens = 0.0, 0
    for start in range(0, count, across):
        first = start + mesh.data_rank * micro_batch
        # Past the end stands padding, so that every rank has a batch of the same shape.
        rows = [i if i < count else len(sequences) for i in range(first, first + micro_batch)]
        more_loss, more_tokens = engine.evaluate(on_device(sequences.rows(rows), mesh.device))
        loss_sum, tokens = loss_sum + more_loss, tokens + more_tokens
    return Evaluation(loss_sum, tokens, bytes_of(sequences) if count == len(sequences) else None)


def bytes_of(sequences: Sequences) -> int | None:
    """The size of the text, from the manifest beside the data."""
    manifest = read_manifest(sequences.prefix)
    split = (manifest or {"splits": {}})["splits"].get(Path(sequences.prefix).name)
    return None if split is None or split["tokens"] != sequences.tokens else split["bytes"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate", description="Evaluate a run's newest checkpoint."
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--data", help="prefix of the .bin/.idx pair (default: the run's data.valid)")
    parser.add_argument("--mesh", help="such as dp=2 (default: the run's under torchrun, else one process)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    try:
        result, path = evaluate_run(Path(args.run), args.data, args.mesh)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.as_dict()) if args.json else describe(result, path))
    return 0


def evaluate_run(folder: Path, data: str | None, mesh_text: str | None) -> tuple[Evaluation, Path]:
    """Evaluate a checkpoint, or the newest whole one of a run; returns its path too."""
    path = checkpoint.choose(folder, lambda sentence: print(f"warning: {sentence}", file=sys.stderr))
    content = checkpoint.read(path)
    config: RunConfig = instantiate(RunConfig, content.config)
    prefix = held_out(config, data)
    mesh_config = config.mesh if "WORLD_SIZE" in os.environ else MeshConfig()
    if mesh_text is not None:
        mesh_config = MeshConfig.parse(mesh_text)
    with joined(mesh_config) as mesh:
        engine = build_engine(config, mesh)
        load(path, engine)
        return evaluate(engine, Sequences(prefix, config.data.sequence_length), config.train.micro_batch), path


def held_out(config: RunConfig, data: str | None) -> str:
    """The data to evaluate on: those that are asked for, or the run's own. Raises ValueError where there are none."""
    prefix = data or config.data.valid
    if prefix is None:
        raise ValueError("the run has no data.valid; name the data with --data PREFIX")
    return prefix


def describe(result: Evaluation, path: Path) -> str:
    bits = result.bits_per_byte
    return (
        f"{path}: loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{'unknown' if bits is None else f'{bits:.4f}'} bits per byte, over {result.tokens:,} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())

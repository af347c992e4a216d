"""A model that was read from elsewhere as the folder of a run at step 0, for every command that takes a run."""

from pathlib import Path
from typing import Any

import torch

from configs.structure import to_plain
from configs.text import dump_yaml
from configs.validate import parse
from models.config import LMConfig
from models.hf.export import Written, difference, loaded
from models.hf.formats import Native
from models.hf.read import Read, read_model
from models.hf.tokenizer import copy_tokenizer, has_tokenizer
from models.lm import LM
from trainer import checkpoint
from trainer.checkpoint import FOLDER, Checkpoint
from trainer.config import RunConfig
from trainer.newfolder import refuse_taken, staged
from trainer.runfolder import CONFIG
from trainer.state import RunState

HEAD = """\
# Continue training on data of your own:
#   weft prepare data/mine SOURCE ...{tokenizer}
#   weft train {out}/config.yaml data.train=data/mine/train
"""
LONGEST = 4096


def import_model(source: Path, out: Path, verify: bool = True) -> Read:
    """Write the folder `out`, new or empty, from a Hugging Face folder; it gets its name when it is complete.

    verify: compare the logits with those of transformers. Raises ValueError for what cannot be read, RuntimeError where
    the logits differ; `out` does not exist then.
    """
    refuse_taken(out, "import")
    read = read_model(source)
    with staged(out) as folder:
        tokenizer = None
        if has_tokenizer(source):
            tokenizer = str(out / "tokenizer")
            (folder / "tokenizer").mkdir()
            copy_tokenizer(source, folder / "tokenizer", read.config.vocab_size)
        config = run_config(read, out, tokenizer)
        content = Checkpoint(RunState(), to_plain(config), read.weights, {})
        checkpoint.write(folder / FOLDER, content, keep=1)
        with_tokenizer = "" if tokenizer is None else f" --tokenizer {tokenizer}"
        head = HEAD.format(out=out, tokenizer=with_tokenizer)
        (folder / CONFIG).write_text(head + dump_yaml(to_plain(config)), encoding="utf-8")
        if verify:
            compare(read, source)
    return read


def run_config(read: Read, out: Path, tokenizer: str | None) -> RunConfig:
    """A run that starts from `out`; what it says about data and steps is to be overridden."""
    data: dict[str, Any] = {
        "model": to_plain(read.config),
        "run": {"dir": f"runs/{out.absolute().name}", "init_from": str(out)},
        "data": {
            "train": "data/mine/train",
            "tokenizer": tokenizer,
            "sequence_length": min(read.max_length or LONGEST, LONGEST),
        },
        "train": {"steps": 1000, "global_batch": 8, "micro_batch": 1, "save_every": 100},
        "optim": {"kind": "adamw", "lr": 1e-5},
        "schedule": {"kind": "cosine", "warmup": 100},
    }
    return parse(RunConfig, data)


def compare(read: Read, source: Path) -> None:
    """Raise RuntimeError unless transformers computes the same from the source."""
    model = loaded(read.config, read.weights, torch.float32)
    reason = difference(source, Written(Native(read.architecture), model, frozenset(), None))
    if reason is not None:
        raise RuntimeError(f"{source} does not compute in Weft what it does in transformers: {reason}")


def describe(config: LMConfig) -> str:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LM(config).parameters())
    return f"{parameters:,} parameters, {len(config.expanded)} layers"

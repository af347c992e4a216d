"""`python -m launch.demo`: everything once, on two processes, from this machine's text to a model that writes Python.

It learns the source of Python's own standard library, which every machine with Python has, and is compared with xz on
files that were held out.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from configs.load import merge
from launch import report
from launch.local import ROOT, environment

BASE = ROOT / "configs" / "demo.yaml"
# Tests, tables and texts in other languages than Python.
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3")
)
PROMPTS = ("def __init__(self, ", "import os", "class ", "    if not isinstance(")


class Size:
    """How much of everything: enough to see it learn, in some minutes."""

    text_bytes, vocab_size, valid_bytes, steps = 12_000_000, 8192, 200_000, 300
    changes: ClassVar[dict[str, Any]] = {}


class Quick(Size):
    """Enough to see that it works, in less than a minute."""

    text_bytes, vocab_size, valid_bytes, steps = 400_000, 512, 20_000, 100
    changes: ClassVar[dict[str, Any]] = {
        "model": {
            "vocab_size": 512,
            "d_model": 32,
            "layers": {
                "G": {"mixer": {"num_heads": 2, "head_dim": 16}, "ffn": {"hidden": 64}},
                "A": {"mixer": {"num_heads": 2}, "ffn": {"hidden": 64}},
            },
        },
        "data": {"sequence_length": 64},
        "train": {"global_batch": 8, "micro_batch": 4, "eval_every": 25},
        "schedule": {"warmup": 2, "decay": 30},
    }


def library(limit: int) -> list[str]:
    """Source files of the standard library, in sorted order, up to `limit` bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    files, size = [], 0
    for file in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(file.relative_to(root).parts[:-1]):
            size += file.stat().st_size
            if size > limit:
                break
            files.append(str(file))
    return files


def started(arguments: Sequence[str], **how: Any) -> "subprocess.Popen[str]":
    """A command of `weft`, as a user would start it; its output goes where ours goes."""
    print(f"$ {shown(arguments)}", flush=True)
    settings = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.Popen(command, env={**environment(os.environ), **settings}, text=True, **how)


def shown(arguments: Sequence[str]) -> str:
    text = "weft " + shlex.join(arguments)
    return text if len(text) < 200 else text[:200] + " ..."


def weft(*arguments: str, **how: Any) -> str:
    """Run a command of `weft` to its end; returns its output where `how` captures it."""
    with started(arguments, **how) as process:
        out, _ = process.communicate()
    refuse_failure(process, arguments)
    return out


def refuse_failure(process: "subprocess.Popen[str]", arguments: Sequence[str]) -> None:
    if process.returncode:
        code = process.returncode
        raise RuntimeError(f"`{shown(arguments)[:60]}` ended with exit code {code}; its own message is above")


def train_until(step: int, config: Path, run: Path) -> None:
    """Train, and send SIGTERM once `step` is done, as a cluster does that wants its machines back."""
    arguments = ("train", str(config))
    with started(arguments) as process:
        while process.poll() is None and report.last_step(run) < step:
            time.sleep(0.2)
        if process.poll() is None:
            print(f"$ kill -TERM {process.pid}", flush=True)
            process.send_signal(signal.SIGTERM)
    refuse_failure(process, arguments)


def write_config(file: Path, run: Path, data: Path, size: type[Size]) -> None:
    """The shipped config with the demonstration's folders and sizes on top."""
    own = {
        "base": str(BASE),
        "run": {"dir": str(run)},
        "data": {name: str(data / name) for name in ("train", "valid")} | {"tokenizer": str(data / "tokenizer.model")},
        "train": {"steps": size.steps, "save_every": size.steps // 4},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(merge(own, size.changes), sort_keys=False), encoding="utf-8")


def title(text: str, began: float) -> None:
    print(f"\n=== {text}  [{time.monotonic() - began:.0f} s]", flush=True)


def demo(folder: Path, size: type[Size]) -> None:
    """Run all of it in `folder`. What is there already is kept: data is used, a run is resumed."""
    began = time.monotonic()
    data, run, exported = folder / "data", folder / "run", folder / "hf"
    config = folder / "config.yaml"
    write_config(config, run, data, size)
    title("Data: a tokenizer is trained, and text becomes tokens", began)
    if data.exists():
        print(f"{data} is there already")
    else:
        numbers = [f"--vocab-size={size.vocab_size}", f"--valid-bytes={size.valid_bytes}"]
        weft("prepare", *numbers, str(data), *library(size.text_bytes))

    title("Training on two processes, which share the parameters; half-way they are told to stop, and save", began)
    if report.last_step(run) < size.steps // 2:
        train_until(size.steps // 2, config, run)
    title("The same command again resumes it, bit for bit", began)
    weft("train", str(config))

    title("Evaluation on files that were held out", began)
    evaluation = json.loads(weft("eval", str(run), "--json", stdout=subprocess.PIPE))
    text = report.held_out(data / "valid", data / "tokenizer.model")
    print(report.comparison(evaluation["bits_per_byte"], text))
    report.curve(run, run / "loss.png")
    title("Export; a fresh process without Weft loads it through transformers, and its logits are compared", began)
    shutil.rmtree(exported, ignore_errors=True)
    weft("export", str(run), str(exported))
    title("Text", began)
    weft("generate", str(run), *PROMPTS, "--max-new-tokens=40", "--temperature=0.7", "--top-p=0.9")

    title("Done", began)
    for path, what in (
        (data, "tokens, tokenizer and manifest"),
        (config, "the run's config, on top of configs/demo.yaml"),
        (run, "checkpoints, resolved config, metrics.jsonl"),
        (run / "loss.png", "the loss; all curves: tensorboard --logdir " + shlex.quote(str(run / "tensorboard"))),
        (exported, "for transformers: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"),
    ):
        print(f"  {path}: {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description="See everything work once.")
    parser.add_argument("--dir", type=Path, default=Path("demo_run"), help="folder to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    args = parser.parse_args(arguments)
    try:
        demo(args.dir, Quick if args.quick else Size)
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

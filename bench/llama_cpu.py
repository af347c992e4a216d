"""Training speed of a 28M Llama on this CPU beside transformers: `python -m bench.llama_cpu [--compile]`.

The sides take turns, each round in fresh processes, so that a machine that slows down slows both; the ratio is that of
the rounds' medians. First both compute the loss of one batch from the same weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from bench import peer_llama
from models.hf.formats import native
from models.lm import LM
from models.params import initialize
from trainer.preflight import load_run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/bench/llama_cpu.yaml")
# Float32 sums in another order, over 8 layers.
SAME = 1e-5


def losses() -> tuple[float, float]:
    """(ours, transformers') of a batch of random tokens, from our initial weights, in float32."""
    config = load_run(CONFIG).model
    model = LM(config)
    initialize(model, 0)
    peer = LlamaForCausalLM(peer_llama.config())
    peer.load_state_dict(native(config).tensors(model), strict=False)
    peer.tie_weights()
    tokens = torch.randint(config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(tokens[:, :-1], tokens[:, 1:])
        theirs = peer(input_ids=tokens, labels=tokens, use_cache=False).loss
    return float(out.loss / out.count), float(theirs)


def speed(command: list[str]) -> float:
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    args = parser.parse_args()
    ours, theirs = losses()
    print(f"loss from the same weights: {ours:.6f} here, {theirs:.6f} in transformers")
    if abs(ours - theirs) > SAME * theirs:
        print("the losses differ: the sides do not compute the same model", file=sys.stderr)
        return 1
    steps = ["--steps", str(args.steps)]
    mine = ["-m", "launch.cli", "bench", CONFIG, *(["train.compile=true"] if args.compile else []), "--json", *steps]
    peer = ["-m", "bench.peer_llama", *(["--compile"] if args.compile else []), *steps]
    found: list[tuple[float, float]] = []
    for index in range(args.rounds):
        found.append((speed(mine), speed(peer)))
        print(f"round {index + 1}: {found[-1][0]:,.0f} and {found[-1][1]:,.0f} tokens/s", flush=True)
    ratio = statistics.median(a for a, _ in found) / statistics.median(b for _, b in found)
    print(f"{ratio:.2f} times transformers, {'compiled' if args.compile else 'eager'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The other side of bench/llama_cpu.py and bench/gpu.py: transformers' Llama in a plain AdamW loop.

Float32 weights under bfloat16 autocast, fused AdamW, clipping, random tokens. Prints tokens per second, and a GPU's
memory, as JSON.
"""

import argparse
import dataclasses
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of configs/bench/llama_cpu.yaml and llama_1b3.yaml."""

    batch: int
    sequence: int
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool


SHAPES = {
    "28m": Shape(8, 512, 8192, 512, 1408, 8, 8, 4, True),
    "1b3": Shape(4, 4096, 32768, 2048, 5632, 24, 16, 16, False),
}


def config(name: str = "28m") -> LlamaConfig:
    shape = SHAPES[name]
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-6,
        attn_implementation="sdpa",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="28m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[args.shape]
    model = LlamaForCausalLM(config(args.shape)).to(args.device)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    began = time.perf_counter()
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            synchronize(args.device)
            began = time.perf_counter()
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), device=args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(args.device)
    found = {"tokens_per_s": args.steps * shape.batch * shape.sequence / (time.perf_counter() - began)}
    if args.device == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(found))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

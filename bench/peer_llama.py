"""The other side of bench/llama_cpu.py: transformers' Llama of 28M parameters in a plain AdamW loop.

Float32 weights under bfloat16 autocast, fused AdamW, clipping, random tokens. Prints tokens per second as JSON.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, SEQUENCE = 8, 512
VOCABULARY = 8192


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        attn_implementation="sdpa",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    began = time.perf_counter()
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            began = time.perf_counter()
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    speed = args.steps * BATCH * SEQUENCE / (time.perf_counter() - began)
    print(json.dumps({"tokens_per_s": speed}))


if __name__ == "__main__":
    main()

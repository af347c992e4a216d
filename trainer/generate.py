"""Text from a model: prompts of different lengths at once, with explicit caches.

Shape suffixes: B prompts, T tokens of the longest prompt, V vocabulary.
"""

import hashlib
import math

import torch
from torch import Tensor

from models.decoding import check_generates
from models.lm import LM
from models.params import upcast


@torch.no_grad()
def generate(
    model: LM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without `eos_id`.

    temperature: 0 takes the likeliest token. top_p: sample among the likeliest tokens that together have this
    probability (Holtzman et al., arXiv 1904.09751). What a prompt gets depends on `seed` and its place in the list, not
    on the other prompts. Raises ValueError for what `check_sampling` refuses, when a plug-in of the model cannot
    generate, or a prompt is empty.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    check_generates(model.config)
    if model.embed is None or model.head is None:
        raise ValueError("the model is one stage of a pipeline, and generation needs all of it; load it on one process")
    if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; begin it with the token that ends a document")
    generators = [row_generator(seed, index) for index in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    was_training = model.training
    model.eval()
    logits_BV, cache = prefill(model, prompts) if prompts else (None, None)
    position_B = torch.tensor([len(prompt) for prompt in prompts], device=next(model.parameters()).device)
    while not all(done):
        assert logits_BV is not None and cache is not None
        token_B = choose(logits_BV, temperature, top_p, generators)
        for row, token in enumerate(token_B.tolist()):
            done[row] = done[row] or token == eos_id
            if not done[row]:
                new[row].append(token)
                done[row] = len(new[row]) == max_new_tokens
        if not all(done):
            out = model(token_B[:, None], positions_BT=position_B[:, None], cache=cache)
            logits_BV, cache, position_B = out.logits[:, -1], out.cache, position_B + 1
    model.train(was_training)
    return new


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for settings that name no way to choose tokens."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1, such as 64")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; it must be finite and at least 0: use 0 for the likeliest token, or 1 for "
            "the model's own probabilities"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1: use 1 to sample among all tokens")


def row_generator(seed: int, index: int) -> torch.Generator:
    """On the CPU, so that every device draws the same."""
    digest = hashlib.blake2b(f"generate/{seed}/{index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def prefill(model: LM, prompts: list[list[int]]) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Logits [B, V] behind each prompt's last token, and the caches. Shorter prompts are padded behind their tokens."""
    device = next(model.parameters()).device
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    index_BT = torch.arange(longest, device=device).expand(len(prompts), -1)
    out = model(
        torch.tensor(padded, device=device),
        documents_BT=torch.where(index_BT < length_B[:, None], 0, -1) if len(set(length_B.tolist())) > 1 else None,
        positions_BT=index_BT,
        cache={},
        keep_BK=length_B[:, None] - 1,
    )
    return out.logits[:, 0], out.cache


def choose(logits_BV: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """One token of each row: [B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    prob_BV, token_BV = (upcast(logits_BV) / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = prob_BV.cumsum(-1) - prob_BV
    kept_BV = prob_BV.masked_fill(before_BV >= top_p, 0).cumsum(-1)
    draw_B = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(kept_BV)
    # The first token whose cumulated probability exceeds the draw; rounding must not lead behind the last one kept.
    index_B = (kept_BV <= draw_B[:, None] * kept_BV[:, -1:]).sum(-1).clamp_max(kept_BV.shape[-1] - 1)
    return token_BV.gather(1, index_B[:, None])[:, 0]

"""Text from a model: prompts of different lengths at once, with explicit caches.

Shape suffixes: B prompts, T tokens of the longest prompt, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from models.decoding import check_generates
from models.lm import LM, Output
from models.params import upcast


class Decoder(Protocol):
    """A model that continues rows of tokens: an `OwnDecoder`, or an `Exported` model."""

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Begin with these rows, none of them empty; returns the logits [B, V] behind each one's last token."""
        ...

    def advance(self, token_B: Tensor) -> Tensor:
        """Add a token to each row; returns the logits [B, V] behind it."""
        ...


class OwnDecoder:
    """run: called as `LM.forward` is, on `device`."""

    def __init__(self, run: Callable[..., Output], device: torch.device | str) -> None:
        self._run, self._device = run, device
        self._cache: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: LM) -> "OwnDecoder":
        """Raises ValueError when the model is not whole, or a plug-in of it cannot generate."""
        check_generates(model.config)
        if model.embed is None or model.head is None:
            raise ValueError(
                "the model is one stage of a pipeline, and generation needs all of them; give --mesh with pp"
            )
        return cls(model, next(model.parameters()).device)

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Shorter prompts are padded behind their tokens."""
        lengths = [len(prompt) for prompt in prompts]
        length_B = self._position_B = torch.tensor(lengths, device=self._device)
        padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
        index_BT = torch.arange(max(lengths), device=self._device).expand(len(prompts), -1)
        out = self._run(
            torch.tensor(padded, device=self._device),
            documents_BT=torch.where(index_BT < length_B[:, None], 0, -1) if len(set(lengths)) > 1 else None,
            positions_BT=index_BT,
            cache={},
            keep_BK=length_B[:, None] - 1,
        )
        return self._logits(out)[:, 0]

    def advance(self, token_B: Tensor) -> Tensor:
        out = self._run(token_B[:, None], positions_BT=self._position_B[:, None], cache=self._cache)
        self._position_B = self._position_B + 1
        return self._logits(out)[:, -1]

    def _logits(self, out: Output) -> Tensor:
        self._cache = out.cache
        assert out.logits is not None
        return out.logits


@torch.no_grad()
def generate(model: LM, prompts: list[list[int]], max_new_tokens: int, **settings: Any) -> list[list[int]]:
    """`decode` with a model of ours; the settings are those."""
    decoder, was_training = OwnDecoder.of(model), model.training
    model.eval()
    try:
        return decode(decoder, prompts, max_new_tokens, **settings)
    finally:
        model.train(was_training)


@torch.no_grad()
def decode(
    decoder: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    first: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without `eos_id`.

    temperature: 0 takes the likeliest token. top_p: sample among the likeliest tokens that together have this
    probability (Holtzman et al., arXiv 1904.09751). What a prompt gets depends on `seed` and its place, which counts
    from `first`, not on the other prompts. Raises ValueError for what `check_sampling` refuses, or an empty prompt.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {first + empty[0]} is empty; begin it with the token that ends a document")
    generators = [row_generator(seed, first + index) for index in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    logits_BV = decoder.start(prompts) if prompts else None
    while not all(done):
        assert logits_BV is not None
        token_B = choose(logits_BV, temperature, top_p, generators)
        for row, token in enumerate(token_B.tolist()):
            done[row] = done[row] or token == eos_id
            if not done[row]:
                new[row].append(token)
                done[row] = len(new[row]) == max_new_tokens
        if not all(done):
            logits_BV = decoder.advance(token_B)
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

"""A model in Hugging Face's format, evaluated and continued as a checkpoint is.

Shape suffixes: B rows, T tokens of the longest row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.hf import folder
from models.loss import IGNORE
from models.params import upcast
from parallel.engine import Batch
from parallel.mesh import Mesh


class Exported:
    """An exported folder on one process.

    Raises ValueError for what does not load, and for code that is not Weft's own unless it is trusted.
    """

    def __init__(self, path: Path, trust: bool = False) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mesh = Mesh.single(device)
        self.model: Any = folder.load(path, device, trust)
        self.vocab_size: int = self.model.config.vocab_size
        self.max_length: int | None = getattr(self.model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(cross-entropy sum, targets). Each document's part of a sequence is a row of its own.

        So native models, which do not know of documents in a row, see what the others see.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        count, together = 0, len(batch.tokens)
        # Rows of about the same length are padded little.
        parts = sorted(documents(batch), key=lambda part: len(part[0]))
        for start in range(0, len(parts), together):
            tokens, targets = zip(*parts[start : start + together], strict=True)
            tokens_BT, mask_BT = padded(tokens, left=False)
            targets_BT = pad_sequence(list(targets), batch_first=True, padding_value=IGNORE)
            out = self.model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
            logits = upcast(out.logits).flatten(0, 1)
            loss += F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum").double()
            count += int((targets_BT != IGNORE).sum())
        return float(loss), count

    def start(self, prompts: list[list[int]]) -> Tensor:
        """Shorter prompts are padded before their tokens, as transformers does."""
        tokens_BT, self._mask_BT = padded([torch.tensor(prompt, device=self.mesh.device) for prompt in prompts], True)
        position_BT = (self._mask_BT.cumsum(1) - 1).clamp_min(0)
        self._position_B, self._cache = position_BT[:, -1], None
        return self._forward(tokens_BT, position_BT)

    def advance(self, token_B: Tensor) -> Tensor:
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        self._position_B = self._position_B + 1
        return self._forward(token_B[:, None], self._position_B[:, None])

    def _forward(self, tokens_BT: Tensor, position_BT: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens_BT,
            attention_mask=self._mask_BT,
            position_ids=position_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1]


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets of each document's part of each row, up to its last target; none without a target."""
    assert batch.documents is not None
    for tokens_T, targets_T, document_T in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        lengths = torch.unique_consecutive(document_T, return_counts=True)[1].tolist()
        for tokens, targets in zip(tokens_T.split(lengths), targets_T.split(lengths), strict=True):
            if len(valid := (targets != IGNORE).nonzero()):
                end = int(valid[-1]) + 1
                yield tokens[:end], targets[:end]


def padded(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, each [B, T]."""
    side = "left" if left else "right"
    tokens_BT = pad_sequence(list(rows), batch_first=True, padding_side=side)
    return tokens_BT, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)

"""Decode caches of ours in the clothes that Hugging Face expects.

Shape suffixes: B batch.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import Cache as HFCache

from models.slots import Cache


class WeftCache(HFCache):
    """What `LM.forward` returned as its cache, and how many tokens it has seen.

    states: by layer, then by name; every tensor has the batch first.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: dict[str, Cache] = {}
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.length = {}, 0

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = {
            layer: {name: function(tensor) for name, tensor in state.items()} for layer, state in self.states.items()
        }

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x_B: x_B.index_select(0, indices.to(x_B.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x_B: x_B.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a WeftCache cannot forget tokens; start again from the prompt")

"""The Hugging Face model of an exported folder: the same modules as in training, behind transformers' interface.

Shape suffixes: B batch, T tokens of this call, S tokens so far (T and those in the cache), V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from configs.structure import instantiate
from models.config import LMConfig
from models.decoding import check_generates
from models.hf.cache import WeftCache
from models.hf.configuration_weft import WeftConfig
from models.lm import LM
from models.loss import IGNORE
from models.params import upcast


class WeftForCausalLM(PreTrainedModel, GenerationMixin):
    """A Weft language model. Rows of unequal length may be padded on either side."""

    config_class = WeftConfig
    main_input_name = "input_ids"
    _is_stateful = True  # a recurrent cache cannot be cut back, which assisted generation would need
    _supports_sdpa = True

    def __init__(self, config: WeftConfig) -> None:
        super().__init__(config)
        self.weft_config: LMConfig = instantiate(LMConfig, config.weft)
        self.model = LM(self.weft_config)
        self._no_split_modules = ["LM"]  # what flows between layers is more than one tensor
        self._keep_in_fp32_modules_strict = float32_buffers(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules whose weights were not in the file: a model made from a config alone.
        for attribute, spec in module.__dict__.get("param_specs", {}).items():
            parameter = getattr(module, attribute)
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(spec.init(spec.shape, torch.default_generator))
        for attribute, value in module.__dict__.get("buffer_values", {}).items():
            getattr(module, attribute).fill_(value)

    def get_input_embeddings(self) -> nn.Module:
        assert self.model.embed is not None
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        assert self.model.head is not None
        return self.model.head

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> bool:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = WeftCache()
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of `GenerationMixin`; refused with ValueError where a plug-in cannot decode step by step."""
        check_generates(self.weft_config)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: WeftCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], and with `labels` [B, T] (-100: no target) the cross-entropy of the next tokens.

        attention_mask: [B, S], 0 at padding. position_ids: [B, T]; without a mask or cache, positions that start anew
        inside a row mark packed sequences. loss: the mean over targets, or their sum over `num_items_in_batch`.
        logits_to_keep: how many of the last positions, or which ones, get logits; with labels, leave it alone.
        token_type_ids are ignored: tokenizers make them unasked.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"a Weft model does not take {unknown[0]}; leave it out")
        cache = self._cache(past_key_values, use_cache, labels)
        past = 0 if cache is None else cache.length
        documents_BT, positions_BT = places(input_ids, attention_mask, position_ids, past)
        keep_BK = columns(input_ids, logits_to_keep)
        rows = Rows(input_ids, documents_BT, positions_BT, keep_BK)
        if documents_BT is not None and bool((documents_BT < 0).any()):
            rows = tokens_first(rows, documents_BT)
        out = self.model(
            rows.tokens_BT,
            documents_BT=rows.documents_BT,
            positions_BT=rows.positions_BT,
            cache=None if cache is None else cache.states,
            keep_BK=rows.keep_BK,
        )
        assert out.logits is not None
        if cache is not None:
            assert out.cache is not None
            cache.states, cache.length = out.cache, past + input_ids.shape[1]
        loss = None if labels is None else next_token_loss(out.logits, labels, documents_BT, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=out.logits, past_key_values=cache)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _cache(self, past: WeftCache | None, use_cache: bool | None, labels: Tensor | None) -> WeftCache | None:
        """The cache of this call: the one handed in, a new one, or none."""
        if past is not None:
            if not isinstance(past, WeftCache):
                raise ValueError(
                    f"past_key_values is a {type(past).__name__}; a Weft model makes its own cache: leave it out "
                    "in the first call, and hand on what that returned"
                )
            return past
        if use_cache is True:
            check_generates(self.weft_config)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training and labels is None
        return WeftCache() if use_cache else None


def float32_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that keep their type when the model is loaded in another."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in module.__dict__.get("buffer_values", {})
    }


def places(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
) -> tuple[Tensor | None, Tensor]:
    """Document ids (-1 at padding, 0 where decoding goes on; None: all 0) and positions, each [B, T]."""
    length = input_ids.shape[1]
    if attention_mask is None:
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        positions_BT = position_ids.expand(input_ids.shape)
        starts_BT = F.pad(positions_BT[:, 1:] != positions_BT[:, :-1] + 1, (1, 0))
        if past or not bool(starts_BT.any()):
            return None, positions_BT
        counts_BT = starts_BT.cumsum(1)
        return counts_BT[:, -1:] - counts_BT, positions_BT  # the last document is 0, so that decoding continues it
    if attention_mask.shape != (input_ids.shape[0], past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be "
            f"{(input_ids.shape[0], past + length)}: a row for each sequence, and {past} cached and {length} new tokens"
        )
    if position_ids is None:
        # Counted from a row's first token, so that padding on the left does not move it.
        position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    real_BT = attention_mask[:, past:] > 0
    return (None if bool(real_BT.all()) else real_BT.long() - 1), position_ids.expand(input_ids.shape)


class Rows(NamedTuple):
    """What the language model is given. keep_BK: the positions that get logits, None for all."""

    tokens_BT: Tensor
    documents_BT: Tensor | None
    positions_BT: Tensor
    keep_BK: Tensor | None


def columns(input_ids: Tensor, logits_to_keep: int | Tensor) -> Tensor | None:
    """[B, K]: the positions that get logits; None for all."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return None
    every_T = torch.arange(input_ids.shape[1], device=input_ids.device)
    kept_K = every_T[-logits_to_keep:] if isinstance(logits_to_keep, int) else every_T[logits_to_keep]
    return kept_K.expand(len(input_ids), -1)


def tokens_first(rows: Rows, documents_BT: Tensor) -> Rows:
    """The same rows with their padding moved behind their tokens, as caches ask; logits keep the order of `rows`."""
    order_BT = (documents_BT < 0).int().argsort(dim=1, stable=True)
    back_BT = order_BT.argsort(dim=1)
    return Rows(
        rows.tokens_BT.take_along_dim(order_BT, dim=1),
        documents_BT.take_along_dim(order_BT, dim=1),
        rows.positions_BT.take_along_dim(order_BT, dim=1),
        back_BT if rows.keep_BK is None else back_BT.take_along_dim(rows.keep_BK, dim=1),
    )


def next_token_loss(
    logits_BTV: Tensor, labels_BT: Tensor, documents_BT: Tensor | None, num_items: Tensor | int | None
) -> Tensor:
    """Mean (or sum / num_items) of the cross-entropy over the targets that lie in their predictor's own document."""
    targets_BT = labels_BT[:, 1:]
    if documents_BT is not None:
        targets_BT = targets_BT.masked_fill(documents_BT[:, 1:] != documents_BT[:, :-1], IGNORE)
    logits, targets = upcast(logits_BTV[:, :-1]).flatten(0, 1), targets_BT.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / ((targets != IGNORE).sum() if num_items is None else num_items)

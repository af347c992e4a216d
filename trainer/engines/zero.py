"""What a rank holds under DeepSpeed's ZeRO: flat float32 parts of weights, of gradients, and of AdamW's averages.

Stages 1 and 2 cut all parameters of a group, laid end to end, into one part per rank; stage 3 cuts each parameter.
Whole tensors are put together through `deepspeed.utils`; what it cannot do is done on the attributes of its optimisers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.optim.adamw import first_moments


class PartAdamW(torch.optim.AdamW):
    """torch's AdamW, over whatever parts DeepSpeed gives it.

    factor: on the gradients, for clipping. left_out: whether the step changes nothing, and only ends as one should.
    """

    factor = 1.0
    left_out = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.left_out:
            return
        if self.factor < 1.0:
            for group in self.param_groups:
                for part in group["params"]:
                    part.grad.mul_(self.factor)
        super().step(closure)


class Parts:
    """Of all parameters. zero: DeepSpeed's optimiser. offload: whether it keeps gradients on the host."""

    def __init__(self, zero: Any, offload: bool) -> None:
        self._zero, self._offload = zero, offload
        for part in self.weights:
            zero.optimizer.state[part] = first_moments(part.detach())

    @property
    def weights(self) -> list[Tensor]:
        raise NotImplementedError

    def forget(self) -> None:
        """Zero the gradients of a step that is done: DeepSpeed would take them again where a parameter has no part in
        the next one."""
        for part in self.weights:
            if part.grad is not None:
                part.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """The parts of the step's gradients, between the last backward pass and the update. No element is in two."""
        if self._offload:
            return [part.grad for part in self.weights if part.grad is not None]
        return [part for parts in self._zero.averaged_gradients.values() for part in parts]

    def updates(self) -> Tensor:
        """How often the weights were updated, the same for all: float32 []."""
        return self._zero.optimizer.state[self.weights[0]]["step"]

    def set_updates(self, count: Tensor) -> None:
        for part in self.weights:
            self._zero.optimizer.state[part]["step"].copy_(count)

    def whole(self, parameter: Tensor, key: str | None = None) -> Tensor:
        """The float32 weights of a parameter, or what AdamW keeps for it under `key` (a collective)."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert value is not None
        return value

    def fill(self, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
        """The reverse of `whole`, on each rank by itself. The weights that the model computes with change too."""
        raise NotImplementedError


class GroupParts(Parts):
    """Under stages 1 and 2."""

    def __init__(self, zero: Any, offload: bool) -> None:
        super().__init__(zero, offload)
        # So that there is a state to save and to load before the first step.
        zero._lazy_init_hp_params_optimizer_state()

    @property
    def weights(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def forget(self) -> None:
        super().forget()
        for sums in getattr(self._zero, "accumulated_grads_in_cpu", {}).values():
            sums.zero_()

    @torch.no_grad()
    def fill(self, parameter: Tensor, value: Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


class ParameterParts(Parts):
    """Under stage 3, where a parameter is filled up to a whole number of elements per rank."""

    @property
    def weights(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def forget(self) -> None:
        super().forget()
        self._zero.grad_partitions_flat_buffer.zero_()

    @torch.no_grad()
    def fill(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        start = torch.distributed.get_rank() * size
        own = value.flatten()[start : start + size]
        own = F.pad(own, (0, size - own.numel()))
        if key is not None:
            safe_set_local_optimizer_state(parameter, own, key)
            return
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.copy_(own)
        # Small parameters, and those of the last pass, are there whole.
        if parameter.numel() == value.numel():
            parameter.copy_(value)

"""Bugs that rivals shipped, planted: each is a context manager that breaks our code the same way inside one process.

Each names the config, the mesh and the memory with which the matrix must see it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.distributed.pipelining import _backward

from models.memory import full
from parallel import check, collectives, data, engine, expert, gradients, pipeline, shards, split_backward, tensor
from parallel.mesh import MeshConfig
from parallel.ranks import Ranks

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


class Place(NamedTuple):
    """Where a plant must be seen: a config by name, a mesh, a kind of memory."""

    config: str
    mesh: str
    memory: str = "none"


class Registry:
    """Plants by name, with the place that must reveal them."""

    def __init__(self) -> None:
        self.plants: dict[str, tuple[Plant, Place]] = {}

    def __call__(self, *place: str) -> Callable[[Callable[[], Iterator[None]]], None]:
        def register(function: Callable[[], Iterator[None]]) -> None:
            self.plants[function.__name__] = (contextlib.contextmanager(function), Place(*place))

        return register


plant = Registry()


def not_reduced_over_tensor_ranks(chosen: Callable[[str], bool]) -> contextlib.AbstractContextManager[Any]:
    """The gradients of the parameters that `chosen` names miss their sum over tensor ranks."""
    honest = gradients.reduce

    def broken(parameters: Any, mesh: Any, shared: Any) -> None:
        parameters = list(parameters)
        picked = [held for held in parameters if chosen(held.shard.name)]
        kept = [held.gradient.clone() for held in picked]
        honest(parameters, mesh, shared)
        for held, gradient in zip(picked, kept, strict=True):
            held.gradient.copy_(gradient)

    return mock.patch.object(gradients, "reduce", broken)


@plant("hybrid", "tp=2")
def output_norm_of_gated_deltanet_not_reduced() -> Iterator[None]:
    """Megatron-LM #7452, repro 11."""
    with not_reduced_over_tensor_ranks(lambda name: name.endswith("branch.mixer.norm.weight")):
        yield


@plant("hybrid", "tp=2")
def final_norm_differs_between_tensor_ranks() -> Iterator[None]:
    """Megatron-LM #1446."""
    with not_reduced_over_tensor_ranks(lambda name: name == "norm.weight"):
        yield


@plant("hybrid", "tp=2")
def router_gradient_wrong_while_the_loss_is_right() -> Iterator[None]:
    """transformers #48687."""
    with not_reduced_over_tensor_ranks(lambda name: name.endswith("router.weight")):
        yield


@plant("latent", "tp=2")
def shared_rotary_key_of_latent_attention_not_reduced() -> Iterator[None]:
    """torchtitan #1373: one key for the heads of all ranks, each of which sees a part of its gradient."""
    with not_reduced_over_tensor_ranks(lambda name: name.endswith("shared_key.weight")):
        yield


@plant("hybrid", "tp=2")
def gathered_logits_fed_to_the_split_loss() -> Iterator[None]:
    """Megatron-LM #7452: the loss is off by log(tp)."""
    honest = tensor.VocabCrossEntropy.__call__

    def broken(self: tensor.VocabCrossEntropy, h_BTD: Any, weight_VD: Any, targets_BT: Any) -> torch.Tensor:
        whole = collectives.gather(weight_VD, 0, self.tp)
        return honest(self, h_BTD, whole, targets_BT)

    with mock.patch.object(tensor.VocabCrossEntropy, "__call__", broken):
        yield


@plant("two_kv_heads", "tp=4")
def replicated_key_value_heads_not_summed() -> Iterator[None]:
    """bigcode/Megatron-LM #35."""
    with mock.patch.object(gradients, "sum_pieces", lambda held, pieces, tp: None):
        yield


@plant("hybrid", "cp=2")
def loss_scaled_by_the_context_size() -> Iterator[None]:
    """Megatron-LM #673, #3959; verl #6609."""
    honest = engine.Engine._local

    def broken(self: engine.Engine, batch: Any, micro_batches: int, scale: float) -> Any:
        return honest(self, batch, micro_batches, scale / self.mesh.cp.size)

    with mock.patch.object(engine.Engine, "_local", broken):
        yield


@plant("hybrid", "tp=2")
def auxiliary_loss_counts_local_tokens_only() -> Iterator[None]:
    """Megatron-LM #3672, #5047: the effective scale depends on the mesh."""
    with mock.patch.object(expert.RankPeers, "sum", lambda self, x: x * self.ranks.size):
        yield


@plant("hybrid", "pp=2")
def gradients_larger_by_the_number_of_tokens_under_pipelines() -> Iterator[None]:
    """torchtitan #2972."""
    honest = pipeline.Stage.forward

    def broken(self: pipeline.Stage, *tensors: Any, **side: Any) -> Any:
        self.scale = 1.0
        return honest(self, *tensors, **side)

    with mock.patch.object(pipeline.Stage, "forward", broken):
        yield


@plant("hybrid", "tp=2")
def gathered_input_without_a_reduction_in_backward() -> Iterator[None]:
    """torchtitan #1805, #1878, #4054: everything below the branch is under-reduced."""

    def broken(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.chunk(ctx.ranks.size, ctx.dim)[ctx.ranks.index].contiguous(), None, None

    with mock.patch.object(collectives._Gather, "backward", staticmethod(broken)):
        yield


@plant("hybrid", "ep=2")
def expert_gradients_doubled() -> Iterator[None]:
    """pytorch #160285, megablocks #86: scaled by the number of expert ranks."""
    honest = gradients.reduce

    def broken(parameters: Any, mesh: Any, shared: Any) -> None:
        parameters = list(parameters)
        honest(parameters, mesh, shared)
        for held in parameters:
            if held.shard.expert:
                held.gradient.mul_(mesh.ep.size)

    with mock.patch.object(gradients, "reduce", broken):
        yield


@plant("hybrid", "fsdp=2")
def load_statistics_counted_twice() -> Iterator[None]:
    """torchtitan #1593."""
    honest = pipeline.Record.add

    def broken(self: pipeline.Record, out: Any) -> None:
        honest(self, out)
        self.stats.append(dict(out.stats))

    with mock.patch.object(pipeline.Record, "add", broken):
        yield


@plant("hybrid", "pp=2")
def balance_bias_updated_per_micro_batch() -> Iterator[None]:
    """torchtitan #3686: the bias moves with local counts, once per micro-batch."""
    honest = engine.Engine.after_step

    def broken(self: engine.Engine, stats: Any) -> None:
        honest(self, stats)
        honest(self, stats)

    with mock.patch.object(engine.Engine, "after_step", broken):
        yield


@plant("hybrid", "pp=2")
def balance_bias_of_some_layers_not_updated() -> Iterator[None]:
    """torchtitan #4494: the hook passes over layers, here those of every stage but the first."""
    honest = engine.Engine.after_step

    def broken(self: engine.Engine, stats: Any) -> None:
        if not self.mesh.pp.index:
            honest(self, stats)

    with mock.patch.object(engine.Engine, "after_step", broken):
        yield


@plant("plain", "dp=2,tp=2", "full")
def layers_run_again_in_another_group() -> Iterator[None]:
    """Megatron-LM #7452, repro 4: what is recomputed gathers over data ranks instead of tensor ranks."""
    honest, gather = full.checkpoint, collectives._Gather.forward
    meshes: list[Any] = []
    construct = engine.Engine.__init__

    def remember(self: engine.Engine, config: Any, mesh: Any, **kwargs: Any) -> None:
        meshes.append(mesh)
        construct(self, config, mesh, **kwargs)

    def elsewhere(ctx: Any, x: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
        other = meshes[-1].data
        return gather(ctx, x, dim, other if ranks == meshes[-1].tp else ranks)

    def broken(run: Callable[..., Any], *tensors: Any, **kwargs: Any) -> Any:
        runs = iter((contextlib.nullcontext(), mock.patch.object(collectives._Gather, "forward", elsewhere)))

        def counted(*given: Any) -> Any:
            with next(runs):
                return run(*given)

        return honest(counted, *tensors, **kwargs)

    with mock.patch.object(engine.Engine, "__init__", remember), mock.patch.object(full, "checkpoint", broken):
        yield


@plant("undone", "ep=2,fsdp=4", "reversible")
def one_function_over_several_fsdp_units() -> Iterator[None]:
    """Our own: a layer is undone as one node though its experts are a unit of FSDP of their own."""
    with mock.patch.object(data, "holds_units", lambda module: False):
        yield


@plant("hybrid", "dp=2")
def loss_averaged_per_rank() -> Iterator[None]:
    """torchtitan #1842, #2206: wrong as soon as ranks have different numbers of valid tokens."""
    with mock.patch.object(engine.Engine, "_sum_over_data", lambda self, x: x * self.mesh.data_size):
        yield


@plant("hybrid", "pp=2,schedule=interleaved")
def pipeline_chunks_initialised_alike() -> Iterator[None]:
    """OLMo-core: interleaved chunks drew the same weights."""
    honest = shards.initial_value

    def broken(spec: Any, name: str, seed: int) -> torch.Tensor:
        return honest(spec, name.replace("layers.3.", "layers.1."), seed)

    with mock.patch.object(shards, "initial_value", broken):
        yield


@plant("hybrid", "tp=2")
def token_wise_gradients_summed_after_every_micro_batch() -> Iterator[None]:
    """Our own first sketch: what was accumulated is reduced again."""
    honest = pipeline.Record.add
    built: list[engine.Engine] = []
    construct = engine.Engine.__init__

    def remember(self: engine.Engine, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        built.append(self)

    def broken(self: pipeline.Record, out: Any) -> None:
        honest(self, out)
        gradients.reduce(built[-1].held(), built[-1].mesh, {})

    with mock.patch.object(engine.Engine, "__init__", remember), mock.patch.object(pipeline.Record, "add", broken):
        yield


@plant("plain", "fsdp=2,pp=2,schedule=zbv")
def fsdp_per_layer_under_a_split_backward() -> Iterator[None]:
    """torch 2.13 gives wrong gradients, or none, without an error."""
    honest = data.parallelize

    def broken(root: Any, model: Any, mesh: Any, dtype: Any) -> None:
        with mock.patch.object(MeshConfig, "splits_backward", property(lambda self: False)):
            honest(root, model, mesh, dtype)

    with mock.patch.object(data, "parallelize", broken):
        yield


@plant("hybrid", "pp=2,schedule=zbv")
def gradients_of_a_split_backward_as_torch_lays_them_out() -> Iterator[None]:
    """Our own: views of a concatenation's gradient, which a fused optimiser reads as if they were contiguous."""
    with mock.patch.object(split_backward, "weight_gradients", _backward.stage_backward_weight):
        yield


@plant("hybrid", "pp=2")
def tied_embedding_not_summed_over_stages() -> Iterator[None]:
    """The copy on the last stage drifts away."""
    with mock.patch.object(engine.Engine, "_shared", lambda self: {}):
        yield


@plant("hybrid", "fsdp=2")
def data_split_wrongly() -> Iterator[None]:
    """torchtitan #816: ranks repeat samples."""
    honest = check.share

    def broken(batch: Any, count: int, data_rank: int, data_size: int) -> Any:
        return honest(batch, count, 0, data_size)

    with mock.patch.object(check, "share", broken):
        yield


@plant("hybrid", "tp=2")
def one_rank_keeps_its_own_gradient() -> Iterator[None]:
    """A rank that decides alone: its replicas part from the others'."""
    honest = Ranks.sum_

    def broken(self: Ranks, x: torch.Tensor) -> torch.Tensor:
        before = x.clone()
        honest(self, x)
        return before if self.index == 1 and x.dim() == 1 and x.numel() > 100 else x

    with mock.patch.object(Ranks, "sum_", broken):
        yield


def run_planted(name: str, *args: Any) -> dict[str, Any]:
    """`check.run_rank` with one bug in place."""
    with plant.plants[name][0]():
        return check.run_rank(*args)

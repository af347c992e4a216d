"""DeepSpeed's ZeRO as a data-parallel engine (Rajbhandari et al., arXiv 1910.02054; offload: arXiv 2101.06840).

DeepSpeed holds the weights, reduces gradients and takes the steps; the loss, the norm, clipping and AdamW are the
native ones, and so are checkpoints: every tensor whole, under its name.
"""

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from models.limits import at_least
from models.lm import Output
from models.params import initial_value
from parallel import gradients, pipeline
from parallel.engine import Engine
from parallel.gradients import Held
from parallel.holdings import State
from parallel.mesh import Mesh
from parallel.pieces import Piece, entire
from trainer.engines.base import EngineConfig, refuse_beside_data
from trainer.engines.zero import GroupParts, ParameterParts, PartAdamW, Parts
from trainer.optim.adamw import AdamWConfig
from trainer.optim.groups import settings
from trainer.state import Updater

if TYPE_CHECKING:
    from trainer.config import RunConfig

AVERAGES = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class DeepSpeedConfig(EngineConfig, kind="deepspeed"):
    """DeepSpeed's ZeRO: data ranks share out what each would otherwise hold whole.

    stage: what they share: 1 the optimiser's state and float32 weights, 2 gradients too, 3 the weights of the
    computation too. offload: what waits in host memory: optimizer is the optimiser's state and float32 weights, which
    the host then updates; all is the weights of the computation too, under stage 3. keep_below: under stage 3,
    parameters of no more elements stay whole on every rank.
    """

    stage: int = 2
    offload: Literal["optimizer", "all"] | None = None
    keep_below: int = 100_000

    package = "deepspeed"

    def __post_init__(self) -> None:
        at_least(self, 0, "keep_below")
        if self.stage not in (1, 2, 3):
            raise ValueError(
                f"stage is {self.stage}; it is 1, 2 or 3, and replicas that share nothing are engine.kind=native"
            )
        if self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload is all, and stage {self.stage} has the weights of the computation on every rank; use "
                "offload=optimizer, or stage=3"
            )

    def refuse(self, run: "RunConfig") -> None:
        refuse_beside_data("deepspeed", run)
        if not isinstance(run.optim, AdamWConfig):
            raise ValueError(
                f"deepspeed updates flat parts of parameters, which optim.kind={run.optim.kind} cannot; use "
                "optim.kind=adamw, or engine.kind=native"
            )
        if run.optim.offload is not None:
            raise ValueError(
                f"optim.offload is {run.optim.offload}, which is of the native engine; leave it out, and use "
                "engine.offload=optimizer"
            )
        if run.optim.sparsity.kind != "none":
            raise ValueError(
                f"deepspeed updates flat parts of parameters, which optim.sparsity={run.optim.sparsity.kind} cannot "
                "mask; leave it out, or use engine.kind=native"
            )
        if run.train.dtype == "float64":
            raise ValueError(
                "deepspeed keeps weights in float32, and train.dtype is float64; use train.dtype=float32, or "
                "engine.kind=native"
            )
        if run.train.dtype == "bfloat16" and self.stage == 1 and self.offload is None:
            raise ValueError(
                "deepspeed has another optimiser for stage 1 in bfloat16, which is not supported here; use "
                "engine.stage=2, or engine.offload=optimizer"
            )
        if run.memory.ahead and self.stage == 3:
            raise ValueError(
                f"memory {run.memory.kind} runs a layer again before stage 3 has gathered its parameters; use another "
                "memory, or engine.stage=2"
            )

    def build(self, run: "RunConfig", mesh: Mesh) -> tuple[Engine, Updater]:
        engine = DeepSpeedEngine(run, mesh, self)
        return engine, DeepSpeedUpdater(engine)

    def settings(self, run: "RunConfig", pin: bool) -> dict[str, Any]:
        """In DeepSpeed's own terms. pin: whether host memory is pinned."""
        host = {"device": "cpu", "pin_memory": pin}
        zero: dict[str, Any] = {"stage": self.stage, "stage3_param_persistence_threshold": self.keep_below}
        if self.offload is not None:
            zero["offload_optimizer"] = host
        if self.offload == "all":
            zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": run.train.micro_batch,
            "gradient_accumulation_steps": run.micro_batches,
            "zero_optimization": zero,
            # The optimiser is a subclass of torch's, on the host too, where DeepSpeed would ask for a compiled one.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": run.train.dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            # Clipping is ours, by the norm that is reported.
            "gradient_clipping": 0.0,
        }


class DeepSpeedEngine(Engine):
    """A model that is built whole on every rank, and then handed to DeepSpeed."""

    def __init__(self, run: "RunConfig", mesh: Mesh, config: DeepSpeedConfig) -> None:
        super().__init__(run.model, mesh, seed=run.run.seed, memory=run.memory)
        deepspeed = imported(mesh.device)
        if not dist.is_initialized():
            # It takes no process that is not of a group.
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        assert isinstance(run.optim, AdamWConfig)
        (model,) = self.models
        self._optimizer = adamw(self, run.optim)
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=config.settings(run, mesh.device == "cuda"),
            dist_init_required=False,
        )
        parts = ParameterParts if config.stage == 3 else GroupParts
        self.parts: Parts = parts(self._deepspeed.optimizer, config.offload is not None)
        self._pending = False
        for held in self.held():
            # It has made the float32 weights of what it rounded to bfloat16.
            piece = held.shard
            self.parts.fill(held.parameter, initial_value(piece.spec, piece.name, run.run.seed))

    def clear_gradients(self) -> None:
        if self._pending:
            self.update(0.0, left_out=True)

    def both_passes(self, side: dict[str, Tensor], scale: float, last: bool) -> Output:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        out = pipeline.forward(self._deepspeed, side)
        assert out.loss is not None
        # It takes the mean over ranks, of what is meant to be a sum.
        self._deepspeed.backward(out.loss * (scale * self.mesh.data_size), scale_wrt_gas=False)
        return out

    def complete_gradients(self) -> None:
        """The backward passes have summed them."""
        self._pending, self._optimizer.factor = True, 1.0

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for part in self.parts.gradients():
            total += gradients.square(part).to(total.device)
        dist.all_reduce(total)
        return total.sqrt()

    def clip(self, max_norm: float, norm: Tensor) -> None:
        self._optimizer.factor = gradients.clip_factor(max_norm, norm)

    def update(self, lr: float, left_out: bool = False) -> None:
        """Take the step whose gradients are there, or drop them (a collective)."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.left_out = left_out
        self._deepspeed.step()
        self.parts.forget()
        self._pending = False

    def pieces(self, state: State | None = None) -> Iterator[tuple[str, Piece, bool]]:
        for index, held in enumerate(self.held()):
            name = held.shard.name
            owner = index % self.mesh.data_size == self.mesh.data_rank
            yield f"model/{name}", entire(self.parts.whole(held.parameter)), owner
            for key, value in state(held).items() if state else ():
                yield f"optimizer/{name}/{key}", entire(value), owner
        yield from self.buffer_pieces()

    def take_up(self, read: Callable[[str, Piece], None], state: State | None = None) -> None:
        counts = set()
        for held in self.held():
            name, value = held.shard.name, torch.empty(held.shard.spec.shape, dtype=torch.float32)
            for key in (None, *(AVERAGES if state else ())):
                read(f"model/{name}" if key is None else f"optimizer/{name}/{key}", entire(value))
                self.parts.fill(held.parameter, value, key)
            if state:
                read(f"optimizer/{name}/step", entire(count := torch.zeros(())))
                counts.add(float(count))
        if len(counts) > 1:
            raise ValueError(
                f"parameters were updated {sorted(counts)} times in the checkpoint, and deepspeed counts for all at "
                "once; go on with engine.kind=native"
            )
        for count in counts:
            self.parts.set_updates(torch.tensor(count))
        for name, own, _ in self.buffer_pieces():
            read(name, own)

    def full_state(self) -> dict[str, Tensor]:
        return {name.removeprefix("model/"): own.on_host().local for name, own, _ in self.pieces()}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        def read(name: str, own: Piece) -> None:
            own.local.copy_(state[name.removeprefix("model/")])

        self.take_up(read)


class DeepSpeedUpdater:
    """Fulfils `trainer.state.Updater`; what it gives of a state is put together, and nothing to write into."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine

    def begin(self, lr: float) -> None:
        """Nothing is done before the gradients are there."""

    def step(self, lr: float) -> None:
        self._engine.update(lr)

    def report(self) -> dict[str, float]:
        return {}

    def state(self, held: Held) -> Mapping[str, Tensor]:
        parts = self._engine.parts
        return {"step": parts.updates(), **{key: parts.whole(held.parameter, key) for key in AVERAGES}}


def adamw(engine: Engine, config: AdamWConfig) -> PartAdamW:
    """Over all parameters, in groups of one setting each."""
    found = settings(engine.config, config.groups, config.weight_decay)
    groups: dict[tuple[float, float, float], list[Tensor]] = {}
    for held in engine.held():
        own = found[held.shard.name]
        groups.setdefault((own.lr_scale, own.weight_decay, own.eps_scale), []).append(held.parameter)
    return PartAdamW(
        [
            {"params": same, "lr_scale": lr_scale, "weight_decay": decay, "eps": config.eps * eps_scale}
            for (lr_scale, decay, eps_scale), same in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def imported(device: str) -> Any:
    """The package, on the device of the mesh and without its account of itself."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        import deepspeed
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its own all-reduce between CPUs, which it would compile for a minute, and which takes the place of gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renames a function that it calls.
    warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")
    warnings.filterwarnings("ignore", message="`torch.distributed.reduce_scatter_tensor` is deprecated")
    return deepspeed

"""What a rank holds of a model and of its optimiser, by global name: whole tensors, and pieces for checkpoints."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from models.lm import LM
from parallel.gradients import Held
from parallel.mesh import Mesh
from parallel.pieces import Piece, entire, piece, with_owners
from parallel.shards import shards, whole, write

State = Callable[[Held], Mapping[str, Tensor]]


class Holdings:
    """Base of engines. models: this rank's parts of the model on `mesh`."""

    models: list[LM]
    mesh: Mesh

    def held(self) -> Iterator[Held]:
        for model in self.models:
            for module, attribute, shard in shards(model, self.mesh):
                yield Held(getattr(module, attribute), shard)

    def pieces(self, state: State | None = None) -> Iterator[tuple[str, Piece, bool]]:
        """(name, piece, whether this rank saves it) of all that a checkpoint holds of this rank (a collective).

        state: of a parameter by name, see `trainer.state.OptimizerState`. A copy of a shared parameter goes by its
        owner's name, so that a name may come twice.
        """
        for held, owner in with_owners(self.held(), self.mesh):
            name = held.shard.name
            yield f"model/{name}", piece(held), owner
            for key, value in state(held).items() if state else ():
                own = piece(held, value) if value.shape else entire(value)
                yield f"optimizer/{name}/{key}", own, owner
        yield from self.buffer_pieces()

    def buffer_pieces(self) -> Iterator[tuple[str, Piece, bool]]:
        """The part of `pieces` that is the same on all ranks of a stage."""
        for model in self.models:
            for name, buffer in model.named_buffers():
                yield f"model/{name}", entire(buffer), self.mesh.stage.index == 0

    def take_up(self, read: Callable[[str, Piece], None], state: State | None = None) -> None:
        """Replace what this rank holds by a checkpoint's. read: fills the piece of a name. state: as in `pieces`."""
        for name, own, _ in self.pieces(state):
            read(name, own)

    def whole_tensors(self, pick) -> dict[str, Tensor]:
        """`pick(held)` of every parameter of this rank's stages, whole, by global name (a collective)."""
        return {h.shard.name: whole(pick(h), h.shard, self.mesh) for h in self.held() if not h.shard.copy}

    def gather(self, pick) -> dict[str, Tensor]:
        """`pick(held)` of every parameter of the model, whole, on the CPU of every rank (a collective)."""
        return self._over_stages(self.whole_tensors(pick))

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model, whole, on the CPU of every rank (a collective)."""
        state = self.whole_tensors(lambda held: held.parameter)
        for model in self.models:
            state |= {model.owners.get(name, name): buffer.clone() for name, buffer in model.named_buffers()}
        return self._over_stages(state)

    def _over_stages(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name: value.detach().cpu() for name, value in state.items()}
        if self.mesh.pp.size > 1:
            everyone: list[dict[str, Tensor] | None] = [None] * self.mesh.pp.size
            dist.all_gather_object(everyone, state, group=self.mesh.pp.group)
            state = {name: value for theirs in everyone for name, value in (theirs or {}).items()}
        return state

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Fill every parameter and buffer from whole tensors; every name must be there."""
        for held in self.held():
            write(held.parameter, held.shard, state[held.shard.name])
        for model in self.models:
            for name, buffer in model.named_buffers():
                buffer.copy_(state[model.owners.get(name, name)])

"""Saving beside the training: a copy to the host, and a thread that writes it while the steps go on.

The thread talks to the other ranks on a process group of its own (gloo), so that its collectives and those of the
training never meet. One save is in flight at a time; how it ended is the same on all ranks.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from configs.errors import sentence
from configs.structure import to_plain
from parallel.engine import Engine
from parallel.pieces import Piece
from trainer import checkpoint
from trainer.checkpoint import FOLDER, Checkpoint, Keep
from trainer.config import RunConfig
from trainer.resume import saved
from trainer.state import OptimizerState, RunState
from trainer.watch import SaveLostError, lost_peer
from trainer.whereabouts import SAVING, Whereabouts


class Saver:
    """Use as a context manager on all ranks together; leaving it waits for the save in flight.

    newest: the step of the newest checkpoint that is whole, if there is one. say: is told what came of a save. One that
    fails is a warning and no error: the older checkpoint is still there, and the next save is tried. But ranks that
    lost one another in a save can save no more, and `save`, `poll`, `wait` and `finish` raise SaveLostError.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        optimizer: OptimizerState,
        newest: int | None,
        say: Callable[[str], object],
        where: Whereabouts,
    ) -> None:
        self._where = where
        self._lost: Exception | None = None
        self._newest, self._say, self._failure, self._failed = newest, say, "", -1
        self._config, self._engine, self._optimizer = config, engine, optimizer
        self._folder = Path(config.run.dir) / FOLDER
        self._keep = Keep(config.train.keep_checkpoints, config.train.keep_every)
        # What is newer than the newest whole one was found damaged when that was looked for.
        self._damaged = {step for step in checkpoint.steps(self._folder) if newest is not None and step > newest}
        group = dist.new_group(backend="gloo", timeout=engine.mesh.timeout) if dist.is_initialized() else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._thread: threading.Thread | None = None
        self._said: list[str] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        # What waits for a lost rank need not be waited for; a save that is whole is published by itself.
        if not lost_peer(error):
            self.wait()

    def save(self, state: RunState) -> None:
        """Begin to save; waits for the save before, and returns once the weights may change (a collective)."""
        self.wait()
        pieces = {name: piece.on_host() for name, piece, owner in saved(self._engine, self._optimizer) if owner}
        self._thread = threading.Thread(target=self._write, args=(state, pieces), name="weft-save")
        self._thread.start()

    def poll(self) -> None:
        """Tell what came of a save that has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if any, and tell what came of it."""
        self._join()
        said, self._said = self._said, []
        for text in said:
            self._say(text)

    def finish(self, state: RunState) -> None:
        """Have the last state on the disk. Raises OSError on all ranks if it cannot be saved (a collective)."""
        self._join()
        if self._failed == state.step:
            # It is tried once more, and the error says what this warning would.
            self._said.clear()
        self.wait()
        if self._newest != state.step:
            self.save(state)
            self._join()
            if self._newest != state.step:
                self._said.clear()
                older = "" if self._newest is None else f"; the run can be resumed from step {self._newest}"
                raise OSError(f"step {state.step}, the last, could not be saved ({self._failure}){older}")
            self.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lost is not None:
            raise SaveLostError("a save lost another process") from self._lost

    def _write(self, state: RunState, pieces: dict[str, Piece]) -> None:
        about = Checkpoint(state, to_plain(self._config), {}, {}, str(self._engine.mesh.config))
        path = self._folder / checkpoint.name_of(state.step)
        self._where.at(f"step {state.step}, writing its checkpoint", SAVING)
        try:
            checkpoint.save(self._folder, about, pieces, self._group)
        except Exception as error:
            if lost_peer(error):
                self._lost = error
                return
            self._failure, self._failed = sentence(error), state.step
            older = (
                "there is no older one" if self._newest is None else f"the newest is still that of step {self._newest}"
            )
            self._said.append(f"warning: the checkpoint of step {state.step} was not saved ({self._failure}); {older}")
            return
        self._newest = state.step
        self._where.saved(state.step)
        self._damaged.discard(state.step)
        self._said.append(f"saved {path}")
        if self._engine.mesh.is_main:
            try:
                checkpoint.prune(self._folder, state.step, self._keep, self._damaged)
            except OSError as error:
                self._said.append(f"warning: older checkpoints could not be deleted ({sentence(error)})")

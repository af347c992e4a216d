"""Documents one behind another, cut where a sequence ends."""

import dataclasses

from trainer.data.packing.base import PackingConfig
from trainer.data.rows import StreamRows
from trainer.data.sequences import Sequences
from trainer.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class Concatenate(PackingConfig, kind="concatenate"):
    """Documents one behind another, cut where a sequence ends; no padding."""

    def pack(self, stream: Stream, length: int) -> StreamRows:
        return Sequences(stream, length)

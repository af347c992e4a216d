"""What every packing is: a way from a stream of documents to sequences of one length.

It depends on the documents and the length alone, so that all ranks, and a run that is resumed, have the same sequences.
"""

import dataclasses

from models.plugin import Plugin
from trainer.data.rows import StreamRows
from trainer.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class PackingConfig(Plugin, slot="packing", folder="trainer.data.packing"):
    """How documents are put into sequences. Whatever the way, a document is not seen from another one."""

    def pack(self, stream: Stream, length: int) -> StreamRows:
        """The sequences of `length` targets each that an epoch goes through."""
        raise NotImplementedError

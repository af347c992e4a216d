"""A document: text of any length, as pieces that fit in memory."""

import codecs
import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Protocol, cast

# Long texts are encoded piece by piece: the time that a tokenizer takes for a text grows faster than the text. In
# SentencePiece pieces of this size have twice the speed of those of a million characters.
PIECE = 1 << 16
BLOCK = 1 << 20


class Document(Protocol):
    """size: bytes of UTF-8. digest: their SHA-256."""

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    def pieces(self, limit: int) -> Iterator[str]:
        """The text in parts of at most `limit` characters, which depend on the text alone."""
        ...


class TextDocument:
    """Text in memory. Raises UnicodeEncodeError for what UTF-8 cannot hold."""

    def __init__(self, text: str) -> None:
        data = text.encode()
        self.text, self.size, self.digest = text, len(data), hashlib.sha256(data).digest()

    def pieces(self, limit: int) -> Iterator[str]:
        return cut([self.text], limit)


class FileDocument:
    """A file, read once for its hash and again for each use. Raises UnicodeDecodeError where it is no UTF-8."""

    def __init__(self, path: str) -> None:
        self.path, self.size, digest = path, 0, hashlib.sha256()
        decoder = codecs.getincrementaldecoder("utf-8")()
        for data in self._blocks():
            decoder.decode(data)
            digest.update(data)
            self.size += len(data)
        decoder.decode(b"", final=True)
        self.digest = digest.digest()

    def _blocks(self) -> Iterator[bytes]:
        with open_stream(self.path) as stream:
            while data := stream.read(BLOCK):
                yield data

    def pieces(self, limit: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        return cut((decoder.decode(data) for data in self._blocks()), limit)


def open_stream(path: str) -> BinaryIO:
    """The content of a file, decompressed where its name ends in .gz or .zst."""
    if not path.endswith((".gz", ".zst")):
        return open(path, "rb")
    import pyarrow

    stream = pyarrow.input_stream(path, compression="gzip" if path.endswith(".gz") else "zstd")
    return io.BufferedReader(cast(io.RawIOBase, stream), BLOCK)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Says of which file a library cannot read the content. Raises ValueError."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path} cannot be read ({str(error).partition(chr(10))[0]}); it is damaged") from error


def cut(blocks: Iterable[str], limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, each up to the last line end in reach; how blocks fall does not matter."""
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > limit:
            end = text.rfind("\n", start, start + limit) + 1 or start + limit
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest

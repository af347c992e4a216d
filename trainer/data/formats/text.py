"""Plain text: a file is a document."""

from collections.abc import Iterator

from trainer.data.document import Document, FileDocument, reading
from trainer.data.format import Format, Span, whole


class Text(Format, kind="text"):
    """UTF-8, byte for byte: line ends are kept."""

    suffixes = (".txt", ".md", ".py", ".txt.gz", ".txt.zst")

    @classmethod
    def spans(cls, path: str, size: int, text_key: str) -> list[Span]:
        return [whole(cls.kind, path)]

    @classmethod
    def documents(cls, span: Span, text_key: str) -> Iterator[Document | None]:
        try:
            with reading(span.path):
                document = FileDocument(span.path)
        except UnicodeDecodeError:
            yield None
        else:
            yield document if document.size else None

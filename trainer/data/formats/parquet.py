"""Parquet: a row is a document. Read by row group, in batches of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.document import Document, TextDocument, reading
from trainer.data.format import Format, Span

ROWS = 256


class Parquet(Format, kind="parquet"):
    """Divided by row groups."""

    suffixes = (".parquet",)

    @classmethod
    def spans(cls, path: str, size: int, text_key: str) -> list[Span]:
        import pyarrow
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                schema, groups = file.schema_arrow, file.num_row_groups
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file, or was cut off ({str(error).splitlines()[0]})") from error
        if text_key not in schema.names:
            names = ", ".join(schema.names)
            raise ValueError(f"{path}: there is no column {text_key!r}; it has {names}: choose with --text-key")
        kind = schema.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not text; choose with --text-key")
        each = Path(path).stat().st_size // max(1, groups)
        step = max(1, size // max(1, each))
        return [
            Span(cls.kind, path, start, min(start + step, groups), each * (min(start + step, groups) - start))
            for start in range(0, groups, step)
        ]

    @classmethod
    def documents(cls, span: Span, text_key: str) -> Iterator[Document | None]:
        import pyarrow.parquet as pq

        groups = list(range(span.start, span.stop))
        with reading(span.path), pq.ParquetFile(span.path, pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    yield document(value)


def document(value: Any) -> Document | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return None
    return TextDocument(text) if text else None

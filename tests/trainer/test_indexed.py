"""The index of a dataset is Megatron's, both ways."""

from pathlib import Path

import numpy as np
import pytest

from trainer.data.indexed import read_index, write_index


def test_megatron_reads_what_is_written_and_is_read(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    lengths = np.array([3, 0, 5], dtype=np.int32)
    for name, vocab, dtype in (("small", 60000, "<u2"), ("large", 70000, "<i4")):
        assert indexed.DType.optimal_dtype(vocab) == np.dtype(dtype)
        tokens = np.arange(8, dtype=dtype)
        (tmp_path / f"{name}.bin").write_bytes(tokens.tobytes())
        write_index(tmp_path / f"{name}.idx", np.dtype(dtype), 3, [lengths[:2], lengths[2:]])
        theirs = indexed.IndexedDataset(str(tmp_path / name))
        assert [theirs[i].tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5, 6, 7]]
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.dtype(dtype).type)
        for part in np.split(tokens, lengths.cumsum())[:-1]:
            builder.add_item(torch.from_numpy(part.astype(np.int64)))
            builder.end_document()
        builder.finalize(str(tmp_path / "m.idx"))
        builder.data_file.close()
        assert (tmp_path / "m.idx").read_bytes() == (tmp_path / f"{name}.idx").read_bytes()
        ours = read_index(str(tmp_path / "m"))
        assert ours.lengths.tolist() == [3, 0, 5] and ours.documents.tolist() == [0, 1, 2, 3] and ours.tokens == 8

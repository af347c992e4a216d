"""Tensors of a checkpoint on the disk: safetensors files per rank, and index.json, which says where each box is.

torch.distributed.checkpoint (DCP) plans who writes what and makes all ranks agree on the outcome; its own storage is
not used, because it reads whole boxes where a slice is wanted and keeps its index as a pickle (docs/experiments.md).
Names are "model/..." and "optimizer/..."; each of the two has files of its own.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from parallel.pieces import Piece, entire
from trainer.durable import sha256_of_file, sync_file

INDEX = "index.json"
# A rank's tensors are spread over files of about this size, which can be hashed side by side.
FILE_BYTES = 1 << 30


class PiecePlanner(DefaultSavePlanner):
    """DCP's own looks a box up only in a subclass of Tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class ShardWriter(StorageWriter):
    """Writes into the folder `staging`, made anew; then rank 0 calls `publish` with the index and digests of files."""

    def __init__(self, staging: Path, publish: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        self.staging, self._publish = staging, publish

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False

    def reset(self, checkpoint_id: object = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: object, **__: object) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Runs on rank 0 before any rank writes."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: list[WriteResult] = []
        for part in sorted({item.index.fqn.split("/")[0] for item in plan.items}):
            items = [item for item in plan.items if item.index.fqn.split("/")[0] == part]
            tensors: dict[str, Tensor] = {}
            pending: list[MetadataIndex] = []
            number = size = 0
            for item in items:
                assert item.index.offset is not None and item.tensor_data is not None
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                name = item.index.fqn.partition("/")[2]
                # A tensor that is whole goes by its own name.
                key = name if value.shape == item.tensor_data.size else f"{name}@{comma(item.index.offset)}"
                tensors[key] = value.contiguous()
                pending.append(item.index)
                size += value.nbytes
                if size >= FILE_BYTES or item is items[-1]:
                    name = f"{part}-{plan.storage_data:05}-{number:03}.safetensors"
                    written += self._write(name, pending, tensors)
                    tensors, pending, size, number = {}, [], 0, number + 1
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def _write(self, name: str, indices: list[MetadataIndex], tensors: dict[str, Tensor]) -> list[WriteResult]:
        file = self.staging / name
        save_file(tensors, file)
        sync_file(file)
        digest = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        return [
            WriteResult(index, tensor.nbytes, (name, key, list(tensor.shape), digest))
            for index, (key, tensor) in zip(indices, tensors.items(), strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs on rank 0 once every rank has written."""
        index: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for result in (result for of_rank in results for result in of_rank):
            file, key, sizes, digest = result.storage_data
            stored = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(stored, TensorStorageMetadata) and result.index.offset is not None
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensor = index.setdefault(result.index.fqn, {"dtype": dtype, "shape": list(stored.size), "boxes": []})
            tensor["boxes"].append({"at": list(result.index.offset), "sizes": sizes, "file": file, "key": key})
            files[file] = digest
        self._publish(index, files)


def comma(numbers: torch.Size) -> str:
    return ",".join(str(number) for number in numbers)


class ShardReader:
    """Reads what a `ShardWriter` wrote: any slice of any tensor, in one process and without a process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._files: dict[str, Any] = {}

    def names(self, part: str) -> list[str]:
        """Of all tensors of "model" or "optimizer", without that prefix."""
        return sorted(name.partition("/")[2] for name in self._index if name.startswith(f"{part}/"))

    def described(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """Raises ValueError for a name that is not there."""
        if name not in self._index:
            raise ValueError(
                f"{self._folder} has no {name}; another model or optimiser saved it: use its config, or another run.dir"
            )
        return getattr(torch, self._index[name]["dtype"]), torch.Size(self._index[name]["shape"])

    def stored(self, name: str) -> list[dict[str, Any]]:
        """The boxes of a tensor: where each is in the whole, its sizes, and the file that holds it."""
        return self._index[name]["boxes"]

    def whole(self, name: str) -> Tensor:
        """A tensor put together from its boxes."""
        dtype, shape = self.described(name)
        value = torch.empty(shape, dtype=dtype)
        self.fill(name, entire(value))
        return value

    @torch.no_grad()
    def fill(self, name: str, piece: Piece) -> None:
        """Read what a piece holds, and no more. Raises ValueError for a name or a shape that is not there."""
        dtype, shape = self.described(name)
        if shape != piece.shape:
            raise ValueError(f"{name} is {list(shape)} in {self._folder}, and {list(piece.shape)} here")
        boxes = self.stored(name)
        chunks = [ChunkStorageMetadata(torch.Size(box["at"]), torch.Size(box["sizes"])) for box in boxes]
        where = {chunk.offsets: box for chunk, box in zip(chunks, boxes, strict=True)}
        stored = TensorStorageMetadata(TensorProperties(dtype), shape, chunks)
        for item in create_read_items_for_chunk_list(name, stored, piece.__create_chunk_list__()):
            assert item.storage_index.offset is not None
            box = where[item.storage_index.offset]
            target = piece.__get_tensor_shard__(item.dest_index)
            source = self._open(box["file"]).get_slice(box["key"])
            for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                target = target.narrow(dim, offset, length)
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            target.copy_(source[tuple(slice(start, start + length) for start, length in ends)])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file]


class Tensors(Mapping[str, Tensor]):
    """The whole tensors of one part of a checkpoint by name, each read when it is asked for."""

    def __init__(self, reader: ShardReader, part: str) -> None:
        self._reader, self._part = reader, part
        self._names = reader.names(part)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._reader.whole(f"{self._part}/{name}")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

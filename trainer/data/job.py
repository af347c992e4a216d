"""The steps of preparing data: read all text once, get the tokenizer, make a shard of every unit, join them."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.data.manifest import FORMAT, MANIFEST
from trainer.data.merge import merge
from trainer.data.pool import unordered
from trainer.data.prepare_config import PrepareConfig
from trainer.data.sample import chosen_units, sample
from trainer.data.shards import Shard, tokenize
from trainer.data.sources import InputFile, Unit, units
from trainer.data.split import SPLITS, Scanned, Split, scan
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig
from trainer.data.workfiles import publishing
from trainer.durable import sync_file, sync_folder
from trainer.progress import counting_bytes


@dataclasses.dataclass(frozen=True)
class Job:
    """One call's work, from files to work/out."""

    config: PrepareConfig
    arguments: dict[str, Any]
    given: Tokenizer | None
    files: list[InputFile]
    work: Path
    console: Console
    workers: int

    def run(self) -> dict[str, Any]:
        tasks = list(units(self.files, self.config.text_key))
        scanned = self.scan(tasks)
        split = self.config.choice.split(scanned)
        tokenizer, path = self.tokenizer(tasks, scanned, split)
        shards = self.tokenize(tasks, scanned, split, path)
        for name in self.splits:
            if not any(shard.splits[name]["documents"] for shard in shards):
                # Of no use to a call that holds out another part.
                shutil.rmtree(self.work / "shards")
                raise self.empty(name, scanned)
        return self.write(tokenizer, path, scanned, shards)

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:1] if self.config.valid_bytes == 0 else SPLITS

    def empty(self, name: str, scanned: list[Scanned]) -> ValueError:
        held = self.arguments["valid"]
        much = f"a fraction of {held['fraction']}" if "fraction" in held else f"{held['wanted']} bytes"
        return ValueError(
            f"{sum(unit.documents for unit in scanned)} documents with {much} held out leave none for {name}; give "
            "more of them, or hold out another part (--valid-bytes 0 holds out nothing)"
        )

    def scan(self, tasks: list[Unit]) -> list[Scanned]:
        with counting_bytes(self.console, "reading", sum(unit.size for unit in tasks)) as advance:
            folder, wanted, found = self.work / "scan", self.config.choice.wanted, []
            arguments = ((unit, self.config.text_key, wanted, folder) for unit in tasks)
            for result in unordered(scan, arguments, self.workers):
                found.append(result)
                advance(tasks[result.index].size)
        if not any(unit.documents for unit in found):
            raise ValueError(
                f"{len(self.files)} files hold no text: {sum(unit.skipped for unit in found)} documents are empty or "
                "not UTF-8; give other sources"
            )
        return sorted(found, key=lambda unit: unit.index)

    def tokenizer(self, tasks: list[Unit], scanned: list[Scanned], split: Split) -> tuple[Tokenizer, Path]:
        """Train it, or copy the given one; what was trained before is kept."""
        folder = self.work / "tokenizer"
        if not folder.is_dir():
            with publishing(folder) as partial:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (self.given or self.train(tasks, scanned, split)).save(partial)
                sync_tree(partial)
        (path,) = folder.iterdir()
        return Tokenizer.load(path), path

    def train(self, tasks: list[Unit], scanned: list[Scanned], split: Split) -> Tokenizer:
        assert isinstance(self.config.tokenizer, TokenizerConfig)
        limit = self.config.tokenizer.sample_bytes
        total = sum(scanned[index].bytes for index in chosen_units(scanned, limit))
        with counting_bytes(self.console, "training the tokenizer", total) as advance:
            texts = sample(tasks, scanned, self.config.text_key, split, limit, advance)
            first = next(texts, None)
            if first is None:
                # Text that would not do with nothing held out either needs another way out.
                everything = sample(tasks, scanned, self.config.text_key, Split(0), limit, lambda _: None)
                SentencePiece.train(everything, self.config.tokenizer)
                raise self.empty("train", scanned)
            return SentencePiece.train(itertools.chain([first], texts), self.config.tokenizer)

    def tokenize(self, tasks: list[Unit], scanned: list[Scanned], split: Split, path: Path) -> list[Shard]:
        with counting_bytes(self.console, "tokenizing", sum(unit.bytes for unit in scanned)) as advance:
            folder, found = self.work / "shards", []
            arguments = ((unit, self.config.text_key, split, str(path), folder) for unit in tasks)
            for shard in unordered(tokenize, arguments, self.workers):
                if shard.digest != scanned[shard.index].digest:
                    raise ValueError(
                        f"a file was changed while it was read (between {tasks[shard.index].spans[0].path} and "
                        f"{tasks[shard.index].spans[-1].path}); remove {self.work} and start again"
                    )
                found.append(shard)
                advance(scanned[shard.index].bytes)
        return sorted(found, key=lambda shard: shard.index)

    def write(self, tokenizer: Tokenizer, path: Path, scanned: list[Scanned], shards: list[Shard]) -> dict[str, Any]:
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(path.parent, out)
        folder, size = self.work / "shards", tokenizer.vocab_size
        splits = {name: merge(shards, name, folder, out / name, size) for name in self.splits}
        manifest = {
            "format": FORMAT,
            "arguments": self.arguments,
            "tokenizer": {
                "kind": tokenizer.kind,
                "file": path.name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
            },
            "splits": splits,
            "skipped": sum(unit.skipped for unit in scanned),
            "sources": [dataclasses.asdict(file) for file in self.files],
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        sync_tree(out)
        return manifest


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync_file(path)
    sync_folder(folder)

"""Preparing: every format gives the same documents, and neither workers nor interruptions show in the result."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

from launch.cli import main
from launch.local import ROOT, environment
from trainer.data.document import TextDocument, cut
from trainer.data.formats.jsonl import JsonLines
from trainer.data.indexed import read_index
from trainer.data.prepare import PrepareConfig, prepare
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizers.sentencepiece import SentencePiece, TokenizerConfig

DRAW = random.Random(1)
WORDS = "warp weft thread loom caf\u00e9 shuttle \U0001f9f5 fabric 1234 def return".split()
TEXTS = ["\n".join(" ".join(DRAW.choices(WORDS, k=9)) for _ in range(DRAW.randrange(1, 30))) for _ in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(SentencePiece.train(TEXTS, TokenizerConfig(330)).save(folder))


def write_lines(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def files_of(
    folder: Path, names: tuple[str, ...] = ("train.bin", "train.idx", "valid.bin", "valid.idx")
) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def test_every_format_gives_the_same_documents(tmp_path: Path, model: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i, body in enumerate(TEXTS):
        (text / f"{i:03}.txt").write_text(body)
    write_lines(tmp_path / "a.jsonl", TEXTS)
    data = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    codec = pyarrow.Codec("zstd")
    (tmp_path / "c.jsonl.zst").write_bytes(codec.compress(data, asbytes=True))
    pq.write_table(pyarrow.table({"text": TEXTS, "n": range(60)}), tmp_path / "d.parquet", row_group_size=7)
    found = []
    for source in (text, *sorted(tmp_path.glob("?.*"))):
        out = tmp_path / f"out-{source.name}"
        prepare(PrepareConfig((str(source),), model, valid_bytes=2000), out)
        found.append(files_of(out))
    assert len(found) == 5 and all(files == found[0] for files in found[1:])


@pytest.mark.parametrize("size", [1, 7, 50, 400, 10**6])
def test_spans_of_lines_hold_each_line_once(tmp_path: Path, size: int) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:20])
    spans = JsonLines.spans(str(tmp_path / "a.jsonl"), size, "text")
    found = [document for span in spans for document in JsonLines.documents(span, "text")]
    assert [document.digest for document in found if document] == [TextDocument(text).digest for text in TEXTS[:20]]


def test_a_text_is_cut_in_one_way() -> None:
    text = "\n".join(TEXTS)
    for limit in (10, 100, 10**6):
        pieces = list(cut([text], limit))
        assert "".join(pieces) == text and max(map(len, pieces)) <= limit
        for step in (1, 13, 5000):
            assert list(cut((text[i : i + step] for i in range(0, len(text), step)), limit)) == pieces


def test_workers_do_not_show(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS * 60)  # several units
    config = PrepareConfig((str(tmp_path / "a.jsonl"),), TokenizerConfig(340, sample_bytes=30_000), valid_fraction=0.1)
    one = prepare(config, tmp_path / "one", workers=1)
    assert prepare(config, tmp_path / "two", workers=2) == one
    names = tuple(sorted(file.name for file in (tmp_path / "one").iterdir()))
    assert files_of(tmp_path / "one", names) == files_of(tmp_path / "two", names)
    assert not list(tmp_path.glob("*.partial"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_at_any_time_it_goes_on(tmp_path: Path, model: str) -> None:
    """SIGKILL takes the parent alone: the workers follow it, and what the next calls do not find whole they redo."""
    write_lines(tmp_path / "a.jsonl", TEXTS * 80)
    config = PrepareConfig((str(tmp_path / "a.jsonl"),), model, valid_bytes=2000)
    expected = prepare(config, tmp_path / "whole", workers=2)
    out, work = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-m", "launch.cli", "prepare", str(out), str(tmp_path / "a.jsonl"), "--workers", "2"]
    command += ["--tokenizer", model, "--valid-bytes", "2000"]
    for stage in ("scan/*.json", "shards/.*", "shards/*.json"):
        process = subprocess.Popen(command, env=environment(os.environ), cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_until(lambda stage=stage: any(work.glob(stage)))
        time.sleep(random.uniform(0, 0.1))
        workers = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not out.exists()
        wait_until(lambda pids=workers: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert prepare(config, out, workers=2) == expected
    assert files_of(out) == files_of(tmp_path / "whole") and not work.exists()


def test_shards_are_kept_and_verified(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS * 60)
    config = PrepareConfig((str(tmp_path / "a.jsonl"),), model, valid_bytes=2000)
    expected = prepare(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("trainer.data.job.merge", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        prepare(config, tmp_path / "out")
    shards = sorted((tmp_path / "out.partial" / "shards").glob("*.train.bin"))
    assert len(shards) > 1 and not (tmp_path / "out").exists()
    damaged = bytearray(shards[1].read_bytes())
    damaged[10] ^= 1
    shards[1].write_bytes(damaged)
    times = [shard.stat().st_mtime_ns for shard in shards]
    other = PrepareConfig((str(tmp_path / "a.jsonl"),), model, valid_bytes=3000)
    with pytest.raises(ValueError, match=r"was prepared with valid .* give another folder"):
        prepare(other, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("trainer.data.job.merge", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        prepare(config, tmp_path / "out")
    assert [shard.stat().st_mtime_ns != time for shard, time in zip(shards, times, strict=True)] == [
        index == 1 for index in range(len(shards))
    ]
    assert prepare(config, tmp_path / "out") == expected and files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    command = ["prepare", str(tmp_path / "out"), str(tmp_path / "a.jsonl"), "--tokenizer", model, "--workers", "1"]
    assert main([*command, "--valid-bytes", "2000"]) == 0
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert main([*command, "--valid-bytes", "2000"]) == 0
    assert "is already prepared with these arguments" in capsys.readouterr().err
    assert main([*command, "--valid-bytes", "3000"]) == 2
    assert "was prepared with valid" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    command[1] = str(tmp_path / "other")
    assert main(command) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine" and files_of(tmp_path / "out") == before
    write_lines(tmp_path / "a.jsonl", TEXTS[:-1])
    command[1] = str(tmp_path / "out")
    assert main([*command, "--valid-bytes", "2000"]) == 2
    assert "was prepared before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{"text": "a"}\n\n{"text": \n',
            "a.jsonl, line 3 (at byte 15): no JSON (EOF while parsing a value at column 8)",
        ),
        (
            '{"body": "a"}\n',
            "a.jsonl, line 1 (at byte 0): there is no key 'text'; the line has body: choose with --text-key",
        ),
        ('{"text": 3}\n', "'text' is int, not text"),
        ('{"text": ""}\n\n{"text": null}\n', "1 files hold no text: 2 documents are empty or not UTF-8"),
        ('{"text": "a b"}\n', "leave none for"),
    ],
)
def test_bad_lines_are_one_sentence(tmp_path: Path, model: str, content: str, sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        prepare(PrepareConfig((str(tmp_path / "a.jsonl"),), model), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("bad", [rb'"lone \ud800 surrogate"', b'"byte \xff"'], ids=["surrogate", "byte"])
def test_lines_that_are_not_utf8_are_passed_over(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], bad: bytes
) -> None:
    """If it is their text that is not; under another key it does not matter."""
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (tmp_path / "good.jsonl").write_bytes(good + b'{"text": "last"}\n')
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": ' + bad + b"}\n" + good + b'{"id": ' + bad + b', "text": "last"}\n')
    for name in ("good", "bad"):
        command = ["prepare", str(tmp_path / name), str(tmp_path / f"{name}.jsonl"), "--tokenizer", model]
        assert main([*command, "--valid-bytes", "2000", "--workers", "1"]) == 0
    assert "documents passed over, because they are empty or not UTF-8: 1" in capsys.readouterr().out
    assert files_of(tmp_path / "bad") == files_of(tmp_path / "good")


def test_an_error_names_the_line_in_any_span(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:20])
    data = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(data + b"{]\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data + b"{]\n"))
    for path, size in ((tmp_path / "a.jsonl", 400), (tmp_path / "a.jsonl.gz", 400)):
        with pytest.raises(ValueError, match=f"{path.name}, line 21 .at byte {len(data)}.: no JSON"):
            for span in JsonLines.spans(str(path), size, "text"):
                list(JsonLines.documents(span, "text"))


@pytest.mark.parametrize(("size", "sentence"), [(100_000, "too small for a vocabulary of 100000"), (340, "leave none")])
def test_what_is_wrong_with_little_text(tmp_path: Path, size: int, sentence: str) -> None:
    """All of it is held out; but only where the rest would do is that what stands in the way."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match=sentence):
        prepare(PrepareConfig((str(tmp_path / "a.jsonl"),), TokenizerConfig(size)), tmp_path / "out")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "d.parquet", "t.txt.gz"])
def test_truncated_files_are_one_sentence(tmp_path: Path, model: str, name: str) -> None:
    if name == "d.parquet":
        pq.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    else:
        write_lines(tmp_path / "a.jsonl", TEXTS)
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name}.*(damaged|cut off)"):
        prepare(PrepareConfig((str(tmp_path / name),), model), tmp_path / "out")


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with an added token behind the vocabulary, and settings that would cut and pad."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|end|>", "<|other|>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_hugging_face_tokenizer(tmp_path: Path, huggingface: Path) -> None:
    texts = [*TEXTS, "it says <|end|> here"]
    write_lines(tmp_path / "a.jsonl", texts)
    config = PrepareConfig((str(tmp_path / "a.jsonl"),), str(huggingface), valid_bytes=0)
    manifest = prepare(config, tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / manifest["tokenizer"]["file"])
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size == 302 and tokenizer.end_of_document == 300
    assert sorted(file.name for file in (tmp_path / "out" / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(manifest["splits"]) == ["train"]
    index = read_index(str(tmp_path / "out" / "train"))
    stream = np.fromfile(tmp_path / "out" / "train.bin", dtype=index.dtype)
    parts = np.split(stream, index.lengths.cumsum())[:-1]
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == texts
    assert all(part[-1] == 300 and 300 not in part[:-1] for part in parts)
    chosen = PrepareConfig((str(tmp_path / "a.jsonl"),), str(huggingface), valid_bytes=0, end_of_document="<|other|>")
    assert prepare(chosen, tmp_path / "chosen")["tokenizer"]["end_of_document"] == 301
    assert Tokenizer.load(tmp_path / "chosen" / "tokenizer").end_of_document == 301
    with pytest.raises(ValueError, match="has no token '<none>'; choose with --eod"):
        prepare(PrepareConfig(("x",), str(huggingface), end_of_document="<none>"), tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("train.bin", lambda data: data[:-2], "train.bin has .* bytes, and .* by its index"),
        ("train.idx", lambda data: data[:-2], "train.idx has .* bytes, and .* by its own header"),
        ("train.idx", lambda data: data[:20], "less than a header"),
        ("train.idx", lambda data: b"x" + data[1:], "does not begin as the index"),
        ("train.bin", lambda data: b"\xff\xff" + data[2:], "has token 65535 at place 0, and the vocabulary ends at"),
        ("train.bin", lambda data: data[:2] + bytes([data[2] ^ 1]) + data[3:], "another SHA-256 than its manifest"),
        ("tokenizer.model", lambda data: data[:-9], "(not a SentencePiece model|another tokenizer)"),
        ("manifest.json", lambda data: data[:-9], "manifest.json is damaged"),
        ("manifest.json", lambda _: b"[]", "is no manifest"),
    ],
)
def test_damage_is_found(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], name: str, change: object, sentence: str
) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare(PrepareConfig((str(tmp_path / "a.jsonl"),), model, valid_bytes=2000), tmp_path / "out")
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    assert "as prepared" in capsys.readouterr().out
    assert main(["data", "show", str(tmp_path / "out")]) == 0
    assert "bytes per token" in capsys.readouterr().out
    file = tmp_path / "out" / name
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    assert main(["data", "verify", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(error)

"""What `weft eval` and `weft generate` make of a run, one of its checkpoints, and exports of it: the same."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from launch.cli import main
from models.config import LMConfig
from models.hf.export import ExportConfig, write
from models.lm import LM
from parallel.engine import Batch
from parallel.mesh import MeshConfig
from parallel.testing import Pool
from tests.contract import tiny
from tests.hf import native_cases
from tests.trainer import runs
from trainer import checkpoint
from trainer.data.sequences import Sequences
from trainer.data.stream import Stream
from trainer.data.tokenizer import Tokenizer
from trainer.evaluation import from_main
from trainer.exported import Exported

# Two ways to order the float32 sums of a few thousand terms.
SUM = 1e-5
HELD = "the warp of the loom.\nthe \u7e54\u308b of thread.\n"


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of exports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        for name in ("WORLD_SIZE", "RANK", "WEFT_TRACEBACK"):
            patch.delenv(name, raising=False)
        yield


class Made(NamedTuple):
    """run: its folder. models: that, its config, its checkpoint, and its two kinds of export."""

    data: Path
    run: Path
    models: dict[str, str]
    texts: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    data = runs.prepare_data(root)
    config = runs.run_config(data, root / "run", steps=20, save_every=0)
    tokenizer = str(data / "tokenizer.model")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    runs.run(config)
    path = checkpoint.choose(root / "run", pytest.fail)
    models = {"run": str(root / "run"), "config": str(root / "run" / "config.yaml"), "checkpoint": str(path)}
    for form in ("native", "self-contained"):
        (root / form).mkdir()
        options = ExportConfig(tokenizer=tokenizer, max_length=24, format=form)
        write(config.model, checkpoint.read(path).model, root / form, options, title=form)
        models[form] = str(root / form)
    (root / "a.txt").write_text(HELD)
    (root / "b.jsonl").write_text(json.dumps({"body": HELD * 3}) + "\n" + json.dumps({"body": "reed"}) + "\n")
    return Made(data, root / "run", models, [str(root / "a.txt"), str(root / "b.jsonl"), "--text-key=body"])


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("weft: ").rstrip()


@pytest.mark.parametrize("model", ["config", "checkpoint", "native", "self-contained"])
@pytest.mark.parametrize("how", [(), ("--window=10", "--stride=3"), ("--limit=3", "--micro-batch=2")])
@pytest.mark.parametrize("what", ["split", "text"])
def test_a_run_and_its_exports_have_the_same_figures(
    capsys: pytest.CaptureFixture[str], made: Made, model: str, how: tuple[str, ...], what: str
) -> None:
    where = made.texts if what == "text" else ["--data", str(made.data / "valid")]
    expected = evaluated(capsys, made.models["run"], *where, *how)
    found = evaluated(capsys, made.models[model], *where, *how)
    assert found.pop("model").startswith(made.models[model] if model != "config" else str(made.run))
    del expected["model"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=SUM)
    assert found == expected


def test_the_figures_are_those_of_the_formula(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    """Each token from all that is before it in its document, if the window is as long."""
    found = evaluated(capsys, made.models["run"], *made.texts, "--window=400", "--stride=1")
    content = checkpoint.read(checkpoint.choose(made.run, pytest.fail))
    model = LM(runs.model())
    model.load_state_dict(dict(content.model))
    tokenizer = Tokenizer.load(made.data / "tokenizer.model")
    end, loss, tokens = tokenizer.end_of_document, 0.0, 0
    for text in (HELD, HELD * 3, "reed"):
        ids = torch.tensor([[end, *tokenizer.encode(text), end]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0].log_softmax(-1)
        loss -= float(logits.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    size = len(HELD.encode()) * 4 + len("reed")
    assert (found["tokens"], found["bytes"]) == (tokens, size)
    assert found["loss"] == pytest.approx(loss / tokens, rel=SUM)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=10 * SUM)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=SUM)


def test_more_context_is_what_a_smaller_stride_gives(capsys: pytest.CaptureFixture[str], made: Made) -> None:
    losses = [evaluated(capsys, made.models["run"], "--window=8", f"--stride={stride}")["loss"] for stride in (8, 2)]
    assert losses[1] < losses[0]


CASES = {name: native_cases.CASES[name] for name in ("qwen3", "qwen3_moe", "qwen3_next")}
CASES["weft"] = tiny.hybrid()


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_mean_the_same_to_an_export(case: str, tmp_path: Path) -> None:
    config: LMConfig = CASES[case]
    model = native_cases.model(config, torch.float32)
    write(config, model, tmp_path, ExportConfig(), title="x")
    exported = Exported(tmp_path)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 12, 3, 9, 1, 1, 20])
    tokens = torch.randint(config.vocab_size, (int(lengths.sum()),), generator=draw).numpy()
    stream = Stream("made", tokens, (lengths.cumsum(0) - lengths).numpy())
    for stride in (16, 5):
        sequences = Sequences(stream, 16, stride)
        batch = sequences.rows(range(len(sequences) + 1))
        with torch.no_grad():
            out = model(batch.tokens, batch.targets, documents_BT=batch.documents, positions_BT=batch.positions)
        loss, count = exported.evaluate(batch)
        assert count == int(out.count) == len(stream)
        # Of each logit, 1e-4 of the largest is what exports are held to.
        assert loss == pytest.approx(float(out.token_loss), rel=1e-4)
    assert exported.evaluate(Batch(*(x[-1:] for x in batch.side().values()))) == (0.0, 0)


def test_text_is_read_on_one_rank_for_all(pool: Pool, made: Made) -> None:
    found = pool.run(read_once, 2)
    assert [stream.name for stream in found] == ["rank 0"] * 2
    assert pool.run(fail_once, 2) == ["no text"] * 2


def read_once() -> Stream:
    import torch.distributed as dist

    rank = dist.get_rank()
    return from_main(rank == 0, lambda: Stream(f"rank {rank}", torch.arange(4).numpy(), torch.zeros(1).numpy()))


def fail_once() -> str:
    import torch.distributed as dist

    def fail() -> Stream:
        raise ValueError("no text")

    try:
        from_main(dist.get_rank() == 0, fail)
    except ValueError as error:
        return str(error)
    return "made"


def test_evaluation_on_a_mesh_hands_on_what_was_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    called: list[Any] = []
    monkeypatch.setattr("launch.agent.work", lambda *arguments: called.extend(arguments) or 0)
    model, how = made.models["checkpoint"], ["--window=10", "--stride=5", "--limit=2", "--micro-batch=1", "--json"]
    assert main(["eval", model, *made.texts, "--mesh=tp=2", *how]) == 0
    assert called[1] == ["-m", "launch.cli", "eval", model, *made.texts[:2], "--mesh=tp=2", made.texts[2], *how]
    assert MeshConfig.parse("tp=2").world_size == called[0].nproc
    assert refused(capsys, "eval", model, "--mesh=tp=2", "nowhere.txt").startswith("'nowhere.txt' has no file; ")
    said = refused(capsys, "eval", model, *made.texts, "--mesh=tp=2,overlap=true")
    assert "adds a branch's output at once" in said, "before any process starts"
    assert refused(capsys, "eval", made.models["native"], "--mesh=tp=2").endswith(
        "is an export, which runs on one process, not on 2; evaluate the run on a mesh instead"
    )


def test_evaluation_refuses(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    run, native, (text, _, key) = made.models["run"], made.models["native"], made.texts

    def said(*arguments: str) -> str:
        return refused(capsys, "eval", *arguments)

    assert said(str(tmp_path)).endswith("has no checkpoint; give the folder of a run that has saved one")
    assert said(run, "--stride=30") == ("stride is 30 and the window 24, which would leave tokens out; use at most 24")
    for name in ("window", "stride", "limit", "micro-batch"):
        assert said(run, f"--{name}=0") == f"{name.replace('-', '_')} is 0; it must be at least 1"
    assert said(run, text, f"--data={text}").startswith("both text (")
    assert said(run, f"--data={text}").endswith("give text without --data, or a prefix without its ending")
    assert said(run, "nowhere.txt").startswith("'nowhere.txt' has no file; ")
    assert "there is no key 'text'" in said(run, *made.texts[:2])
    (tmp_path / "empty.txt").touch()
    assert said(run, str(tmp_path / "empty.txt")).endswith(
        "holds no text: 1 documents are empty or not UTF-8; give other files"
    )
    assert said(native) == f"{native} is an export, which has no data; name text files to evaluate on, or --data PREFIX"
    assert said(run, text, f"--tokenizer={tmp_path}/none", key).endswith("give one that weft prepare wrote")


def test_an_export_that_does_not_fit(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    config = dataclasses.replace(runs.model(), vocab_size=310)
    model = native_cases.model(config, torch.float32)
    write(config, model, tmp_path, ExportConfig(format="self-contained"), title="x")
    folder, valid, tokenizer = str(tmp_path), str(made.data / "valid"), str(made.data / "tokenizer.model")

    def said(*arguments: str) -> str:
        return refused(capsys, *arguments)

    assert said("eval", folder, "--data", valid).endswith(
        "does not say how long its sequences are; give --window, such as 1024"
    )
    assert "a tokenizer of 320 pieces and the model" in said("eval", folder, "--data", valid, "--window=9")
    assert said("eval", folder, made.texts[0], "--window=9") == (
        f"{folder} names no tokenizer, so that text and tokens cannot meet; give --tokenizer PATH"
    )
    assert said("generate", folder, "Hi").endswith("give --tokenizer PATH")
    sentence = (
        f"has 320 pieces and the model {folder} a vocabulary of 310; give the tokenizer that the model was trained with"
    )
    assert said("eval", folder, made.texts[0], "--window=9", "--tokenizer", tokenizer).endswith(sentence)
    assert said("generate", folder, "Hi", "--tokenizer", tokenizer).endswith(sentence)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON (" in said("eval", folder, made.texts[0])


def test_code_that_is_not_ours_runs_only_if_it_is_trusted(
    capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path
) -> None:
    valid = ["--data", str(made.data / "valid")]
    expected = evaluated(capsys, made.models["self-contained"], *valid)
    folder = shutil.copytree(made.models["self-contained"], tmp_path / "foreign")
    with (folder / "modeling_weft.py").open("a") as file:
        file.write("\nprint('it ran')\n")
    said = refused(capsys, "eval", str(folder), *valid)
    assert "brings code, which loading it runs, and modeling_weft.py is not what this Weft writes" in said
    assert main(["eval", str(folder), *valid, "--json", "--trust-remote-code"]) == 0
    ran, line = capsys.readouterr().out.strip().split("\n")
    assert ran == "it ran" and json.loads(line)["loss"] == pytest.approx(expected["loss"], rel=SUM)
    data = json.loads((folder / "config.json").read_text())
    for wrong, why in (
        ({"auto_map": {"AutoConfig": "other/repository--code.Config"}}, "names other classes than an export does"),
        ({"weft": None}, "holds no model of Weft's"),
        ({"weft": {"layers": 3}}, "this Weft does not have its model"),
    ):
        (folder / "config.json").write_text(json.dumps({**data, **wrong}))
        assert why in refused(capsys, "eval", str(folder), *valid)

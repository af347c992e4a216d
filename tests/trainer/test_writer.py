"""Text from a run, one of its checkpoints and its exports."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from tests.trainer.test_evaluation import Made, made, own_modules, refused
from trainer.data.tokenizer import Tokenizer

__all__ = ["made", "own_modules"]
PROMPTS = ["the warp", "", "the thread of the loom.\nthe "]


def texts(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["generate", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    return [line["text"] for line in lines]


@pytest.mark.parametrize("how", [(), ("--temperature=1.5", "--top-p=0.9", "--seed=3")])
def test_a_run_and_its_exports_write_the_same(
    capsys: pytest.CaptureFixture[str], made: Made, how: tuple[str, ...]
) -> None:
    # An exported tokenizer shows bytes that are no UTF-8 in its own way.
    how = (f"--tokenizer={made.data}/tokenizer.model", "--max-new-tokens=12", *how)
    found = {name: texts(capsys, model, *PROMPTS, *how) for name, model in made.models.items()}
    assert len(set(found["run"])) > 1
    assert found == dict.fromkeys(found, found["run"])


@pytest.mark.parametrize("form", ["native", "self-contained"])
def test_greedy_text_is_what_transformers_generates(capsys: pytest.CaptureFixture[str], made: Made, form: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = made.models[form]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form != "native").eval()
    tokenizer = Tokenizer.load(made.data / "tokenizer.model")
    end = tokenizer.end_of_document
    rows = [[end, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    new = [row[: row.index(end)] if end in row else row for row in out[:, longest:].tolist()]
    assert texts(capsys, made.models["run"], *PROMPTS, "--max-new-tokens=12") == [tokenizer.decode(row) for row in new]


def test_prompts_from_a_file(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    """A prompt's text is the same wherever it stands in a file, and however many are written at once."""
    run, how = made.models["run"], ["--max-new-tokens=6", "--temperature=1"]
    prompts = ["the reed", "the  shuttle\u2028of", "the warp"]
    (tmp_path / "p.txt").write_text("the reed\r\n\nthe  shuttle\u2028of\nthe warp")
    lines = [json.dumps({"prompt": prompt, "n": 1}, ensure_ascii=False) + "\n" for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    expected = texts(capsys, run, *prompts, *how)
    assert texts(capsys, run, "--prompts", str(tmp_path / "p.txt"), *how) == expected
    assert texts(capsys, run, "--prompts", str(tmp_path / "p.jsonl"), *how, "--batch=2") == expected
    assert main(["generate", run, "--prompts", str(tmp_path / "p.txt"), *how]) == 0
    assert capsys.readouterr().out == "".join(p + t + "\n" for p, t in zip(prompts, expected, strict=True))


def test_generation_refuses(capsys: pytest.CaptureFixture[str], made: Made, tmp_path: Path) -> None:
    run, file = made.models["run"], tmp_path / "p.jsonl"

    def said(*arguments: str) -> str:
        return refused(capsys, "generate", run, *arguments)

    assert said() == "no prompt is given; write one behind the model, or give a file with --prompts"
    assert said("Hi", "--batch=0") == "--batch is 0; it must be at least 1"
    assert said("--prompts", str(file)) == f"--prompts {file} is no file; give one with a prompt in each line"
    file.write_text("\n \n")
    assert said("--prompts", str(file)) == f"--prompts {file} holds no prompt; write one in each line"
    file.write_bytes(b"\xff\n")
    assert said("--prompts", str(file)).startswith(f"--prompts {file} is not UTF-8 (")
    file.write_text('\n{"text": "a"}\n')
    assert said("--prompts", str(file)) == f"{file}, line 2: 'prompt' is null, not text; choose with --prompt-key"
    file.write_text("a\n")
    assert said("--prompts", str(file)).startswith(f"{file}, line 1: no JSON (")
    assert said("Hi", "--tokenizer", str(file)).startswith(f"the tokenizer {file} is not a SentencePiece model")


def test_a_pipeline_writes_what_one_process_writes(made: Made) -> None:
    """Prompts that look like options too; each once, by one process of those that are started."""
    command = [sys.executable, "-m", "launch.cli", "generate", made.models["run"], "--max-new-tokens=6", "--json"]
    prompts = ["--", "the warp", "--reed"]
    found = [
        subprocess.run([*command, *mesh, *prompts], capture_output=True, text=True, timeout=120, check=True).stdout
        for mesh in ([], ["--mesh=pp=2"])
    ]
    assert found[0] == found[1] and len(found[0].splitlines()) == 2


@pytest.mark.parametrize(
    ("model", "mesh", "said"),
    [
        ("run", "tp=2", "--mesh tp=2 has other ranks than a pipeline's, .*; give pp=2, or leave --mesh out"),
        ("run", "pp=2,fsdp=2", "give pp=2 alone, or leave --mesh out"),
        ("run", "pp=8", "pp=8 makes 8 stages and the number of layers is"),
        ("native", "pp=2", "is an export, which runs on one process"),
    ],
)
def test_meshes_that_cannot_write(
    capsys: pytest.CaptureFixture[str], made: Made, model: str, mesh: str, said: str
) -> None:
    assert re.search(said, refused(capsys, "generate", made.models[model], "text", f"--mesh={mesh}"))

"""From a model to a folder that Hugging Face transformers loads without Weft.

Shape suffixes: B batch, T sequence, V vocabulary.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from models.config import LMConfig
from models.decoding import refusals
from models.hf import reload
from models.hf.card import model_card
from models.hf.formats import Format, chooser
from models.hf.tokenizer import GENERATION, SAMPLE, export_tokenizer
from models.lm import LM

WEFT = ("configs", "models", "parallel", "trainer", "launch")
COPIES = "transformers_modules"
CHECK_SHAPE = (2, 72)  # rows longer than the 64 tokens of a linear mixer's chunk


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What an export holds beside the model.

    tokenizer: a SentencePiece model file, or a folder with a Hugging Face tokenizer. eos_id, bos_id, pad_id: default
    the tokenizer's. max_length: tokens that the model was trained to see. dtype: of the saved parameters, such as
    bfloat16; default their own. generation: defaults of `generate`, such as temperature. max_shard_size: of one weight
    file. format: native, a model of transformers' own; self-contained, one with its code; auto, native where there is
    exactly such a model.
    """

    tokenizer: str | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_shard_size: str = "5GB"
    format: str = "auto"

    def __post_init__(self) -> None:
        chooser(self.format)
        dtype = None if self.dtype is None else getattr(torch, self.dtype, None)
        if self.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {self.dtype!r}; write the name of a floating type of torch, such as bfloat16")


def export(config: LMConfig, weights: Mapping[str, Tensor] | nn.Module, out: Path, options: ExportConfig) -> Format:
    """Write the folder `out`, which must be new or empty, and check it before it gets its name.

    weights: an unsharded `LM`, or its state dict. Returns the form that was chosen. The check loads the folder in a
    process where Weft cannot be imported, and compares the logits of a random batch. Raises ValueError when something
    given cannot be exported, RuntimeError when the check fails; `out` does not exist then.
    """
    out = out.resolve()  # the check runs in another current folder, and `.` and `..` are no names
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; export to a new one, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        written = write(config, weights, folder, options, title=out.name)
        check(folder, written)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return written.format


class Written(NamedTuple):
    """What the check of a written folder compares with."""

    format: Format
    model: LM
    optional: frozenset[str]
    sample_ids: list[int] | None


def write(
    config: LMConfig, weights: Mapping[str, Tensor] | nn.Module, folder: Path, options: ExportConfig, title: str
) -> Written:
    """Fill an empty folder, without checking it."""
    form = chooser(options.format)(config)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    model = loaded(config, state, None if options.dtype is None else getattr(torch, options.dtype))
    optional = form.write_sources(config, folder)
    tokenizer = export_tokenizer(options.tokenizer, folder, config.vocab_size, options.max_length)
    special = {
        "bos_token_id": options.bos_id if options.bos_id is not None else tokenizer.bos_id,
        "eos_token_id": options.eos_id if options.eos_id is not None else tokenizer.eos_id,
        "pad_token_id": options.pad_id if options.pad_id is not None else tokenizer.pad_id,
    }
    dtype = str(stored_dtype(model)).removeprefix("torch.")
    settings = {"torch_dtype": dtype, "max_position_embeddings": options.max_length, **special}
    write_json(folder / "config.json", form.config(config, settings))
    write_json(folder / GENERATION, {**drop_none(special), **tokenizer.generation, **options.generation})
    save_torch_state_dict(form.tensors(model), folder, max_shard_size=options.max_shard_size, metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors lets the owner alone read what it writes
    count = sum(parameter.numel() for parameter in model.parameters())
    card = model_card(title, config, count, dtype, form.about, form.remote_code)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return Written(form, model, optional, tokenizer.sample_ids)


def loaded(config: LMConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> LM:
    """The model with these weights on the CPU, its parameters cast to `dtype`; ValueError when they do not fit."""
    with torch.device("meta"):
        model = LM(config).eval()
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"the weights lack {missing[0]} ({len(missing)} missing); they belong to another config")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"the weights hold {unknown[0]}, which the config does not have ({len(unknown)} such)")
    parameters = dict(model.named_parameters())
    cast = {}
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, and the config says {tuple(expected[name].shape)}; "
                "export unsharded weights of this config"
            )
        cast[name] = tensor.detach().to("cpu", dtype if name in parameters else None).contiguous()
    model.load_state_dict(cast, assign=True)
    return model


def stored_dtype(model: LM) -> torch.dtype:
    assert model.head is not None
    return model.head.weight.dtype


def drop_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def expected(written: Written) -> reload.Expected:
    """What the folder must give: the logits of a random batch, in the type that the format is checked in."""
    model, form = written.model, written.format
    model.to(form.check_dtype(stored_dtype(model)))
    tokens_BT = torch.randint(model.config.vocab_size, CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits
    assert logits_BTV is not None
    decodes = form.remote_code and not any(refusals(model.config))
    return reload.Expected(tokens_BT, logits_BTV, SAMPLE, written.sample_ids, form.tolerance, form.remote_code, decodes)


def check(folder: Path, written: Written) -> None:
    """RuntimeError when the folder does not load as what was written."""
    reason = difference(folder, written)
    if reason is not None:
        raise RuntimeError(f"the export does not reload as it should, so that nothing was written: {reason}")


def difference(folder: Path, written: Written) -> str | None:
    """Load `folder` in a fresh process that cannot import Weft; what differs from what is expected, if anything."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        facts = Path(scratch) / "check.safetensors"
        reload.save_check(facts, expected(written))
        # -P and the paths of this process: the same torch, but no module from a current folder, and no code that
        # transformers copied from the exports that this process loaded.
        command = [sys.executable, "-P", reload.__file__, str(folder), str(facts), *WEFT, *written.optional]
        settings = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path and not Path(path, COPIES).is_dir()),
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        result = subprocess.run(command, cwd=scratch, env={**os.environ, **settings}, capture_output=True, text=True)
    if not result.returncode:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]

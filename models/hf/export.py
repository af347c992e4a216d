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

from configs.structure import to_plain
from models.config import LMConfig
from models.decoding import refusals
from models.hf import reload
from models.hf.card import model_card
from models.hf.sources import collect
from models.hf.tokenizer import SAMPLE, export_tokenizer
from models.lm import LM
from models.plugin import plugins_in

ROOTS = ("models.hf.configuration_weft", "models.hf.modeling_weft")
WEFT = ("configs", "models", "parallel", "trainer", "launch")
CHECK_SHAPE = (2, 72)  # rows longer than the 64 tokens of a linear mixer's chunk


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What an export holds beside the model.

    tokenizer: a SentencePiece model file, or a folder with a Hugging Face tokenizer. eos_id, bos_id, pad_id: default
    the tokenizer's. max_length: tokens that the model was trained to see. dtype: of the saved parameters, such as
    bfloat16; default their own. generation: defaults of `generate`, such as temperature. max_shard_size: of one weight
    file.
    """

    tokenizer: str | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        dtype = None if self.dtype is None else getattr(torch, self.dtype, None)
        if self.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {self.dtype!r}; write the name of a floating type of torch, such as bfloat16")


def export(config: LMConfig, weights: Mapping[str, Tensor] | nn.Module, out: Path, options: ExportConfig) -> None:
    """Write the folder `out`, which must be new or empty, and check it before it gets its name.

    weights: an unsharded `LM`, or its state dict. The check loads the folder in a process where Weft cannot be
    imported, and compares the logits of a random batch. Raises ValueError when something given cannot be exported,
    RuntimeError when the check fails; `out` does not exist then.
    """
    out = out.resolve()  # the check runs in another current folder, and `.` and `..` are no names
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; export to a new one, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        check(folder, write(config, weights, folder, options, title=out.name))
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder)
        raise


class Written(NamedTuple):
    """What the check of a written folder compares with."""

    model: LM
    optional: frozenset[str]
    sample_ids: list[int] | None


def write(
    config: LMConfig, weights: Mapping[str, Tensor] | nn.Module, folder: Path, options: ExportConfig, title: str
) -> Written:
    """Fill an empty folder, without checking it."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    model = loaded(config, state, None if options.dtype is None else getattr(torch, options.dtype))
    sources = collect(ROOTS, {type(plugin).__module__ for plugin in plugins_in(config)})
    for name, text in sources.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = export_tokenizer(options.tokenizer, folder, config.vocab_size, options.max_length)
    special = {
        "bos_token_id": options.bos_id if options.bos_id is not None else tokenizer.bos_id,
        "eos_token_id": options.eos_id if options.eos_id is not None else tokenizer.eos_id,
        "pad_token_id": options.pad_id if options.pad_id is not None else tokenizer.pad_id,
    }
    write_json(folder / "config.json", hf_config(config, model, special, options.max_length))
    write_json(folder / "generation_config.json", {**drop_none(special), **options.generation})
    save_torch_state_dict(
        {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        folder,
        max_shard_size=options.max_shard_size,
        metadata={"format": "pt"},
    )
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors lets the owner alone read what it writes
    count = sum(parameter.numel() for parameter in model.parameters())
    card = model_card(title, config, count, str(stored_dtype(model)).removeprefix("torch."))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return Written(model, sources.optional, tokenizer.sample_ids)


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


def hf_config(config: LMConfig, model: LM, special: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """What config.json says."""
    return drop_none(
        {
            "architectures": ["WeftForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_weft.WeftConfig",
                "AutoModelForCausalLM": "modeling_weft.WeftForCausalLM",
            },
            "model_type": "weft",
            "torch_dtype": str(stored_dtype(model)).removeprefix("torch."),
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": len(config.expanded),
            "max_position_embeddings": max_length,
            "tie_word_embeddings": config.tie_embeddings,
            "use_cache": not any(refusals(config)),
            **special,
            "weft": to_plain(config),
        }
    )


def drop_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def check(folder: Path, written: Written) -> None:
    """Load `folder` in a fresh process that cannot import Weft; RuntimeError when it differs from what was written.

    The comparison runs in at least float32, whatever the stored type.
    """
    model = written.model
    model.to(torch.promote_types(stored_dtype(model), torch.float32))
    tokens_BT = torch.randint(model.config.vocab_size, CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV = model(tokens_BT).logits
    assert logits_BTV is not None
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "check.safetensors"
        reload.save_check(expected, tokens_BT, logits_BTV, SAMPLE, written.sample_ids)
        # -P and the paths of this process: the same torch, but no module from a current folder.
        command = [sys.executable, "-P", reload.__file__, str(folder), str(expected), *WEFT, *written.optional]
        settings = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": f"{scratch}/modules",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        result = subprocess.run(command, cwd=scratch, env={**os.environ, **settings}, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise RuntimeError(f"the export does not reload as it should, so that nothing was written: {reason}")

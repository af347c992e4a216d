"""From prompts to texts, by whatever holds a model: a run, a checkpoint or an exported folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import shown
from configs.structure import instantiate
from models.decoding import check_generates
from models.hf.folder import is_exported, read_config
from parallel.decoding import Relay
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.precision import master
from parallel.preflight import refuse
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.data.document import open_stream, reading
from trainer.data.fitting import fitting_tokenizer
from trainer.data.formats.jsonl import JsonLines
from trainer.evaluation import own_tokenizer, refuse_mesh
from trainer.exported import Exported
from trainer.generate import Decoder, OwnDecoder, decode
from trainer.loaded import load_whole
from trainer.resume import load

Write = Callable[..., list[str]]


def writer(model: Path, tokenizer: str | None, trust: bool, mesh: Mesh | None = None) -> Write:
    """A function of (prompts, max_new_tokens, and settings of `decode`) that returns what follows each prompt.

    tokenizer: default the model's own. trust: run an export's code whatever it is. mesh: of the ranks that hold a run's
    model and all call this alike, default this process. Raises ValueError, one sentence, where the model or its
    tokenizer cannot be used.
    """
    if is_exported(model):
        vocab_size = read_config(model).get("vocab_size", 0)
        own = fitting_tokenizer(tokenizer or own_tokenizer(model), str(model), vocab_size)
        decoder: Decoder = Exported(model, trust)
    else:
        config, decoder = whole(model) if mesh is None else pipelined(model, mesh)
        own = fitting_tokenizer(tokenizer or config.data.tokenizer, str(model), config.model.vocab_size)
    end = own.end_of_document

    def write(prompts: list[str], max_new_tokens: int, **settings: Any) -> list[str]:
        # As in training, where a document opens with the token that ended the one before.
        rows = [[end, *tokens] for tokens in own.encode_batch(prompts)]
        new = decode(decoder, rows, max_new_tokens, eos_id=end, **settings)
        # Ids between the tokenizer's vocabulary and the model's stand for no text.
        return [own.decode([token for token in tokens if token < own.vocab_size]) for tokens in new]

    return write


def whole(folder: Path) -> tuple[RunConfig, Decoder]:
    """A run's config, and its model in this process."""
    config, model, _ = load_whole(folder)
    return config, OwnDecoder.of(model)


def pipelined(folder: Path, mesh: Mesh) -> tuple[RunConfig, Decoder]:
    """A run's config, and its model over the ranks of a pipeline (a collective)."""
    path, config = chosen(folder)
    refuse_pipeline(config, mesh.config)
    dtype = master(getattr(torch, config.train.dtype))
    engine = Engine(config.model, mesh, seed=config.run.seed, dtype=dtype, sequence=config.data.sequence_length)
    load(path, engine)
    for stage in engine.stages:
        stage.eval()
    return config, OwnDecoder(Relay(engine.stages, mesh), mesh.device)


def chosen(folder: Path) -> tuple[Path, RunConfig]:
    """The checkpoint that is taken of a run's folder, or the one that it is, and its run's config."""
    path = checkpoint.choose(folder, lambda text: print(f"weft: warning: {text}", file=sys.stderr))
    return path, instantiate(RunConfig, checkpoint.read(path).config)


def refuse_pipeline(config: RunConfig, mesh: MeshConfig) -> None:
    """Raise ValueError where a run's model cannot generate on the mesh."""
    check_generates(config.model)
    if mesh.world_size != mesh.pp:
        raise ValueError(
            f"--mesh {mesh} has other ranks than a pipeline's, and texts are written by one process or by pipeline "
            f"ranks; give {f'pp={mesh.pp} alone' if mesh.pp > 1 else 'pp=2'}, or leave --mesh out"
        )
    refuse(config.model, mesh)


def refuse_writing(folder: Path, mesh: MeshConfig) -> None:
    """Raise ValueError where what a folder holds cannot generate on the mesh, without reading weights."""
    if is_exported(folder):
        refuse_mesh(folder, str(mesh))
    refuse_pipeline(chosen(folder)[1], mesh)


def prompts_of(file: str, key: str) -> list[str]:
    """The lines of a text file that are not blank, or the prompts of JSON lines. Raises ValueError where none is."""
    if not Path(file).is_file():
        raise ValueError(f"--prompts {file} is no file; give one with a prompt in each line")
    try:
        with reading(file), open_stream(file) as stream:
            # Other line ends that Unicode knows may stand in a prompt.
            lines = stream.read().decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file} is not UTF-8 ({error.reason}); write it as UTF-8") from error
    found = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise ValueError(f"--prompts {file} holds no prompt; write one in each line")
    if not file.endswith(JsonLines.suffixes):
        return list(found.values())
    return [prompt_of(line, key, f"{file}, line {number}") for number, line in found.items()]


def prompt_of(line: str, key: str, where: str) -> str:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where}: no JSON ({error}); a line must be one object, with its prompt under a key"
        ) from error
    prompt = data.get(key) if isinstance(data, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: {key!r} is {shown(prompt)}, not text; choose with --prompt-key")
    return prompt

"""From prompts to texts, by whatever holds a model: a run, a checkpoint or an exported folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import shown
from models.hf.folder import is_exported, read_config
from trainer.data.document import open_stream, reading
from trainer.data.fitting import fitting_tokenizer
from trainer.data.formats.jsonl import JsonLines
from trainer.evaluation import own_tokenizer
from trainer.exported import Exported
from trainer.generate import Decoder, OwnDecoder, decode
from trainer.loaded import load_whole

Write = Callable[..., list[str]]


def writer(model: Path, tokenizer: str | None, trust: bool) -> Write:
    """A function of (prompts, max_new_tokens, and settings of `decode`) that returns what follows each prompt.

    tokenizer: default the model's own. trust: run an export's code whatever it is. Raises ValueError, one sentence,
    where the model or its tokenizer cannot be used.
    """
    if is_exported(model):
        vocab_size = read_config(model).get("vocab_size", 0)
        own = fitting_tokenizer(tokenizer or own_tokenizer(model), str(model), vocab_size)
        decoder: Decoder = Exported(model, trust)
    else:
        config, lm, _ = load_whole(model)
        own = fitting_tokenizer(tokenizer or config.data.tokenizer, str(model), config.model.vocab_size)
        decoder = OwnDecoder(lm)
    end = own.end_of_document

    def write(prompts: list[str], max_new_tokens: int, **settings: Any) -> list[str]:
        # As in training, where a document opens with the token that ended the one before.
        rows = [[end, *tokens] for tokens in own.encode_batch(prompts)]
        new = decode(decoder, rows, max_new_tokens, eos_id=end, **settings)
        # Ids between the tokenizer's vocabulary and the model's stand for no text.
        return [own.decode([token for token in tokens if token < own.vocab_size]) for tokens in new]

    return write


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

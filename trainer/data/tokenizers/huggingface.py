"""The folder of a Hugging Face tokenizer, read by the `tokenizers` library from its tokenizer.json."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from models.hf.tokenizer import FILES
from trainer.data.tokenizer import Tokenizer

JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
# What the field calls it, where the folder does not say.
USUAL = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>", "[SEP]")


class HuggingFace(Tokenizer, kind="huggingface"):
    """end: the token that ends documents (default: the folder's eos_token, or what the field usually calls it)."""

    name = "tokenizer"

    def __init__(self, folder: Path, end: str | None = None) -> None:
        self.path = folder
        try:
            data = (folder / JSON).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"the tokenizer {folder / JSON} cannot be read ({error}); get it anew") from error
        # What the file says for the inputs of some model would cut off documents, or fill them up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that holds the name of a special token is text.
        self._tokenizer.encode_special_tokens = True
        self.end = end or self._named_end()
        found = self._tokenizer.token_to_id(self.end)
        if found is None:
            raise ValueError(f"the tokenizer {folder} has no token {self.end!r}; choose with --eod")
        self._end_of_document = found
        self.sha256 = hashlib.sha256(data + self.end.encode()).hexdigest()

    @classmethod
    def what(cls) -> str:
        return f"a Hugging Face tokenizer's folder with {JSON} (save_pretrained of a fast tokenizer writes it)"

    @classmethod
    def reads(cls, path: Path) -> bool:
        return (path / JSON).is_file() or (path.name == JSON and path.is_file())

    @classmethod
    def open(cls, path: Path) -> "HuggingFace":
        return cls(path if path.is_dir() else path.parent)

    def _named_end(self) -> str:
        token = self._settings().get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
        for usual in USUAL:
            if self._tokenizer.token_to_id(usual) is not None:
                return usual
        raise ValueError(f"the tokenizer {self.path} names no eos_token; choose what ends documents with --eod")

    def _settings(self) -> dict[str, Any]:
        file = self.path / SETTINGS
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); get it anew") from error
        return settings if isinstance(settings, dict) else {}

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_of_document(self) -> int:
        return self._end_of_document

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> Path:
        """The files that make up a tokenizer, of a folder that may hold a model too, with eos_token set to `end`."""
        out = folder / self.name
        out.mkdir(parents=True)
        for pattern in FILES:
            for file in self.path.glob(pattern):
                shutil.copyfile(file, out / file.name)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings(), "eos_token": self.end}
        (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return out

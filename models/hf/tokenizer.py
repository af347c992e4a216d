"""The tokenizer of an exported folder: a Hugging Face one is copied, a SentencePiece model is rewritten as one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers

SAMPLE = "A thread  of 12 words:\n\tCaf\u00e9 \U0001f9f5 \u7e54\u308b, <s> [x]=3.14 and so on."
FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
GENERATION = "generation_config.json"
SPACE = "\u2581"
UNREACHABLE = (
    -1000.0
)  # log-probability of pieces that no text may encode to; far from it, yet without loss of precision


class Exported(NamedTuple):
    """What the rest of the export needs to know. sample_ids: what SAMPLE must become. generation: what the folder says
    about `generate`."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    sample_ids: list[int] | None = None
    generation: Mapping[str, Any] = MappingProxyType({})


def export_tokenizer(source: str | None, folder: Path, vocab_size: int, max_length: int | None) -> Exported:
    """Write the files of tokenizer `source` (a SentencePiece model, a Hugging Face folder, or None) to `folder`."""
    if source is None:
        return Exported()
    path = Path(source)
    if path.is_dir():
        return copy_tokenizer(path, folder, vocab_size)
    if path.is_file():
        return convert_sentencepiece(path, folder, vocab_size, max_length)
    raise ValueError(
        f"the tokenizer {path} does not exist; give a SentencePiece model or a Hugging Face tokenizer's folder"
    )


def check_size(path: Path, size: int, vocab_size: int) -> None:
    if size > vocab_size:
        raise ValueError(f"the tokenizer {path} has {size} tokens and the model {vocab_size}; it is another model's")


def copy_tokenizer(path: Path, folder: Path, vocab_size: int) -> Exported:
    from transformers import AutoTokenizer  # takes seconds, which an export without one need not wait

    tokenizer = AutoTokenizer.from_pretrained(path)
    check_size(path, len(tokenizer), vocab_size)
    for pattern in FILES:
        for file in path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    generation: dict[str, Any] = {}
    if (path / GENERATION).is_file():
        shutil.copyfile(path / GENERATION, folder / GENERATION)
        generation = json.loads((path / GENERATION).read_text(encoding="utf-8"))
    said = {
        key: value for key, value in generation.items() if key not in ("transformers_version", "_from_model_config")
    }
    return Exported(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, ids, said)


def has_tokenizer(path: Path) -> bool:
    """Whether a folder in Hugging Face's format has one."""
    return any(file.is_file() for pattern in FILES for file in path.glob(pattern))


def convert_sentencepiece(path: Path, folder: Path, vocab_size: int, max_length: int | None) -> Exported:
    """Write tokenizer.json. One difference: a text's own U+2581, which SentencePiece uses for a space, becomes one.

    A model without a padding token pads with its unknown token.
    """
    processor = SentencePieceProcessor(model_file=str(path))
    size = processor.vocab_size()
    check_size(path, size, vocab_size)
    pieces = [processor.id_to_piece(index) for index in range(size)]
    scores = [processor.get_score(index) for index in range(size)]
    learned = {
        piece: index
        for index, piece in enumerate(pieces)
        if not (processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index))
    }
    unknown = processor.unk_id()
    if all(scores[index].is_integer() for index in learned.values()):
        # BPE scores are minus the order of the merges, unigram's are log-probabilities.
        model = models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges(learned, scores),
            unk_token=pieces[unknown],
            byte_fallback=True,
            fuse_unk=True,
        )
    else:
        scored = [(piece, scores[index] if piece in learned else UNREACHABLE) for index, piece in enumerate(pieces)]
        model = models.Unigram(scored, unk_id=unknown, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    prefixed = processor.encode("a", out_type=str)[0].startswith(SPACE)
    first, last = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if prefixed else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    tokenizer.decoder = decoders.Sequence(steps)
    special = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    present = {name: index for name, index in special.items() if index >= 0}
    # Batches need one. The end-of-document token would hide real ends from losses that leave padding out; the unknown
    # token stands in no text where bytes spell what has no piece, and tells nothing elsewhere.
    present.setdefault("pad", unknown)
    tokenizer.add_special_tokens([pieces[index] for index in sorted({unknown, *present.values()})])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": pieces[unknown],
        **{f"{name}_token": pieces[index] for name, index in present.items()},
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as in training, no text encodes to a special token
        **({"model_max_length": max_length} if max_length is not None else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ids = list(processor.encode(SAMPLE))
    return Exported(present.get("bos"), present.get("eos"), present.get("pad"), ids)


def merges(learned: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first: what SentencePiece tries, as a list."""
    pairs = []
    for piece, index in learned.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in learned and right in learned:
                pairs.append((-scores[index], learned[left], learned[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(pairs)]

"""From a folder in Hugging Face's format to a model of ours, for the architectures in `models.hf.native`.

Whatever config.json says is either part of the model that comes out, or without meaning for it, or refused by name:
the config that we would write for that model has to be the one that was read.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import sentence, shown
from models.config import LMConfig
from models.hf.architecture import Architecture
from models.lm import LM

# What says nothing about the computation of a model whose rotary angles are not scaled: who made it, how it was
# initialised, what generation does with it, and how a loss would be added up.
HARMLESS = frozenset(
    "architectures model_type transformers_version _name_or_path dtype torch_dtype initializer_range pretraining_tp "
    "max_position_embeddings bos_token_id eos_token_id pad_token_id use_cache return_dict output_hidden_states "
    "output_attentions output_router_logits router_aux_loss_coef id2label label2id problem_type".split()
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAVED_BUFFER = "rotary_emb.inv_freq"  # computed from rope_theta; older versions of transformers saved it


class Read(NamedTuple):
    """A model that was read. max_length: tokens that it was made for, if known."""

    architecture: type[Architecture]
    config: LMConfig
    weights: dict[str, Tensor]
    max_length: int | None


def read_model(folder: Path) -> Read:
    """Raises ValueError, one sentence, for what is missing, does not fit together, or Weft does not have."""
    data = read_json(folder, "config.json", "give a folder in Hugging Face's format")
    architecture, config = understand(data, folder / "config.json")
    weights = convert(architecture, config, dict(tensors(folder)), folder)
    return Read(architecture, config, weights, data.get("max_position_embeddings"))


def read_json(folder: Path, name: str, hint: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({sentence(error)}); {hint}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object; {hint}")
    return data


def understand(data: Mapping[str, Any], file: Path) -> tuple[type[Architecture], LMConfig]:
    """The model that config.json describes. Raises ValueError naming the first key that cannot be followed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    readable = {name: cls for name, cls in Architecture.kinds().items() if cls.reads}
    name = data.get("model_type")
    if not isinstance(name, str) or name not in readable:
        raise ValueError(f"{file}: model_type is {shown(name)}; what can be read is {', '.join(readable)}")
    architecture, hf_class = readable[name], CONFIG_MAPPING[name]
    try:
        given = hf_class.from_dict(dict(data))
        fields = given.to_dict()
        aliases = {alias: fields[key] for alias, key in given.attribute_map.items() if key in fields}
        config = architecture.lm_config({**fields, **aliases})
        written = hf_class.from_dict(architecture.hf_config(config)).to_dict()
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {sentence(error)}") from error
    for key, value, ours in unlike(fields, written):
        if key.partition(".")[0] not in HARMLESS | architecture.harmless:
            raise ValueError(f"{file}: {key} is {shown(value)}, and a {name} of Weft has {shown(ours)} there")
    return architecture, config


def unlike(given: Any, written: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, given, written) of every leaf that differs; what only one side has is None on the other."""
    if isinstance(given, dict) and isinstance(written, dict):
        # A type first, because it explains the keys beside it.
        for name in sorted(
            given.keys() | written.keys(), key=lambda name: (not str(name).endswith("_type"), str(name))
        ):
            yield from unlike(given.get(name), written.get(name), f"{key}.{name}" if key else name)
    elif given != written:
        yield key, given, written


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's safetensors by name, mapped from the files rather than read."""
    if (folder / INDEX).is_file():
        index = read_json(folder, INDEX, "fetch it anew").get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) and "/" not in file for file in index.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files beside it; fetch it anew")
        files = sorted(set(index.values()))
    elif (folder / WEIGHTS).is_file():
        index, files = None, [WEIGHTS]
    else:
        other = "; it has pickled weights, which transformers' save_pretrained turns into safetensors"
        has_bin = any(folder.glob("pytorch_model*"))
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}{other if has_bin else '; fetch it completely'}")
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path} does not exist, and {INDEX} names it; fetch it completely")
        try:
            with safe_open(path, framework="pt") as content:
                for name in content.keys():
                    if index is None or index.get(name) == file:
                        yield name, content.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({sentence(error)}); fetch it anew") from error


def convert(
    architecture: type[Architecture], config: LMConfig, theirs: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Their tensors as ours, of the widest of their types. Raises ValueError for one that is missing, too many, or of
    another shape or kind than config.json says."""
    links = architecture.links(config)
    with torch.device("meta"):
        empty = LM(config).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for link in links:
        made = link.to_theirs([empty[name] for name in link.ours])
        shapes |= {name: tuple(tensor.shape) for name, tensor in zip(link.theirs, made, strict=True)}
    if config.tie_embeddings:
        drop_tied(theirs, folder)
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith(SAVED_BUFFER)}
    if missing := [name for name in shapes if name not in theirs]:
        raise ValueError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing); config.json asks for it")
    if more := sorted(theirs.keys() - shapes.keys()):
        raise ValueError(
            f"{folder} holds the tensor {more[0]} ({len(more)} such), which a {architecture.kind} with this "
            "config.json does not have"
        )
    for name, tensor in theirs.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}; config.json says {shapes[name]}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{folder}: {name} has type {tensor.dtype}; quantized weights cannot be trained on")
    dtype = next(iter(theirs.values())).dtype
    for tensor in theirs.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    ours: dict[str, Tensor] = {}
    for link in links:
        taken = link.to_ours([theirs.pop(name).to(dtype) for name in link.theirs])
        ours |= {name: tensor.contiguous() for name, tensor in zip(link.ours, taken, strict=True)}
    return ours


def drop_tied(theirs: dict[str, Tensor], folder: Path) -> None:
    """Some files repeat a tied embedding as the head; raises ValueError where the two differ."""
    head, embedding = theirs.pop("lm_head.weight", None), theirs.get("model.embed_tokens.weight")
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise ValueError(
            f"{folder}: lm_head.weight is not model.embed_tokens.weight, and config.json says tie_word_embeddings true"
        )

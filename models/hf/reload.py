"""Run as a script in a process of its own: load an exported folder as its users will, and compare with the original.

Arguments: the folder, a file made by `save_check`, and the packages that must not be needed.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Expected(NamedTuple):
    """What the reloaded model must give: logits for tokens, and, where there is a tokenizer, ids for a text.

    tolerance: of the largest logit. remote_code: whether the folder brings code of its own.
    """

    tokens_BT: Tensor
    logits_BTV: Tensor
    text: str
    ids: list[int] | None
    tolerance: float
    remote_code: bool


def save_check(file: Path, expected: Expected) -> None:
    settings = {**expected._asdict(), "threads": torch.get_num_threads()}
    tensors = {name: settings.pop(f"{name}_{shape}") for name, shape in (("tokens", "BT"), ("logits", "BTV"))}
    save_file(tensors, file, {name: json.dumps(value) for name, value in settings.items()})


def compare(folder: str, check: str) -> str | None:
    """One sentence on what differs, or None."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with safe_open(check, framework="pt") as file:
        tokens_BT, expected_BTV = file.get_tensor("tokens"), file.get_tensor("logits")
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
    torch.set_num_threads(settings["threads"])
    trust = {"trust_remote_code": True} if settings["remote_code"] else {}
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=expected_BTV.dtype, **trust).eval()
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    error = ((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()
    if not error <= settings["tolerance"]:
        return (
            f"the reloaded model's logits differ by {error:.1e} of the largest; {settings['tolerance']:.0e} is allowed"
        )
    if (ids := settings["ids"]) is not None:
        tokenizer, text = AutoTokenizer.from_pretrained(folder), settings["text"]
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != ids:
            return f"the reloaded tokenizer encodes {text!r} as {found}; the training tokenizer gives {ids}"
    return None


if __name__ == "__main__":
    for package in sys.argv[3:]:
        sys.modules[package] = None  # type: ignore[assignment]
    if difference := compare(sys.argv[1], sys.argv[2]):
        sys.exit(difference)

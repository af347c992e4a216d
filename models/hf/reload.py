"""Run as a script in a process of its own: load an exported folder as its users will, and compare with the original.

Arguments: the folder, a file made by `save_check`, and the packages that must not be needed.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LONG, SHORT = 8, 3  # tokens of the two prompts that are decoded together
# Rounding makes 1e-6; a state or document that padding moved makes a difference as large as the logits themselves.
PADDING_TOLERANCE = 1e-3


class Expected(NamedTuple):
    """What the reloaded model must give: logits for tokens, and, where there is a tokenizer, ids for a text.

    tolerance: of the largest logit. remote_code: whether the folder brings code of its own. decodes: whether that code
    generates.
    """

    tokens_BT: Tensor
    logits_BTV: Tensor
    text: str
    ids: list[int] | None
    tolerance: float
    remote_code: bool
    decodes: bool


def save_check(file: Path, expected: Expected) -> None:
    settings = {**expected._asdict(), "threads": torch.get_num_threads()}
    tensors = {name: settings.pop(f"{name}_{shape}") for name, shape in (("tokens", "BT"), ("logits", "BTV"))}
    save_file(tensors, file, {name: json.dumps(value) for name, value in settings.items()})


@torch.no_grad()
def padding_error(model: Any, tokens_BT: Tensor) -> float:
    """The largest difference, of the largest logit, that padding makes to a row's next token after a cached prompt."""
    long, short = tokens_BT[:1, : LONG + 1], tokens_BT[1:2, : SHORT + 1]
    rows_BT = torch.cat([long, torch.cat([short.new_zeros(1, LONG - SHORT), short], 1)])
    mask_BT = torch.ones_like(rows_BT)
    mask_BT[1, : LONG - SHORT] = 0
    together_V = next_logits(model, rows_BT, mask_BT)[1]
    alone_V = next_logits(model, short, torch.ones_like(short))[0]
    return ((together_V - alone_V).abs().max() / alone_V.abs().max()).item()


def next_logits(model: Any, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, V]: behind the last token, which is decoded with the cache of the others."""
    start = model(input_ids=tokens_BT[:, :-1], attention_mask=mask_BT[:, :-1], use_cache=True)
    out = model(input_ids=tokens_BT[:, -1:], attention_mask=mask_BT, past_key_values=start.past_key_values)
    return out.logits[:, -1]


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
    if settings["decodes"] and not (error := padding_error(model, tokens_BT)) <= PADDING_TOLERANCE:
        return (
            f"a short row that is padded in a batch continues with logits {error:.1e} of the largest away from those "
            "that it gets alone: a plug-in's cache moves over padding, which Mixer.core in models/slots.py rules out; "
            "mend that, or let its config say incremental = False"
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

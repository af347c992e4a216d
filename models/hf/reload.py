"""Run as a script in a process of its own: load an exported folder as its users will, and compare with the original.

Arguments: the folder, a file made by `save_check`, and the packages that must not be needed.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Both sides run the same operations on the same weights, so that only the order of sums can differ: about
# sqrt(width) * 6e-8 of the largest logit in float32. A wrong weight or config shows at 1e-2 and above.
TOLERANCE = 1e-5


def save_check(file: Path, tokens_BT: Tensor, logits_BTV: Tensor, text: str, ids: list[int] | None) -> None:
    """What the reloaded model must give: logits for tokens, and, where there is a tokenizer, ids for a text."""
    metadata = {"text": json.dumps(text), "ids": json.dumps(ids), "threads": str(torch.get_num_threads())}
    save_file({"tokens": tokens_BT, "logits": logits_BTV}, file, metadata)


def compare(folder: str, check: str) -> str | None:
    """One sentence on what differs, or None."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with safe_open(check, framework="pt") as file:
        tokens_BT, expected_BTV, metadata = file.get_tensor("tokens"), file.get_tensor("logits"), file.metadata()
    torch.set_num_threads(int(metadata["threads"]))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=expected_BTV.dtype, trust_remote_code=True
    ).eval()
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    error = ((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()
    if not error <= TOLERANCE:
        return f"the reloaded model's logits differ by {error:.1e} of the largest; {TOLERANCE:.0e} is allowed"
    if (ids := json.loads(metadata["ids"])) is not None:
        tokenizer, text = AutoTokenizer.from_pretrained(folder), json.loads(metadata["text"])
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != ids:
            return f"the reloaded tokenizer encodes {text!r} as {found}; the training tokenizer gives {ids}"
    return None


if __name__ == "__main__":
    for package in sys.argv[3:]:
        sys.modules[package] = None  # type: ignore[assignment]
    if difference := compare(sys.argv[1], sys.argv[2]):
        sys.exit(difference)

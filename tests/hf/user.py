"""A user without Weft: run as a script, loads exported folders and writes what they do as JSON.

Arguments: a JSON list of folders, each with `expected.safetensors` (tokens, logits) beside the model; the result file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

PROMPTS = [[3, 7, 1, 9, 4], [5, 2], [8, 8, 6, 1]]
NEW = 4


def load(folder: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def padded(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        pad = [0] * (longest - len(prompt))
        ids.append(pad + prompt if side == "left" else prompt + pad)
        one = [1] * len(prompt)
        mask.append(pad + one if side == "left" else one + pad)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def stepwise(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def generated(model: Any, prompts: list[list[int]], count: int = NEW, **kwargs: Any) -> list[list[int]]:
    inputs = padded(prompts, "left")
    out = model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, pad_token_id=0, do_sample=False, **kwargs
    )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def facts(folder: str) -> dict[str, Any]:
    """What holds for every kind, in float64."""
    model = load(folder)
    expected = load_file(Path(folder) / "expected.safetensors")
    tokens, logits = expected["tokens"], expected["logits"]
    plain = model(input_ids=tokens, labels=tokens)
    decodes = model.config.use_cache
    cached = model(input_ids=tokens, use_cache=decodes)
    target = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    singles = [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    padding = {}
    for side in ("left", "right"):
        inputs = padded(PROMPTS, side)
        rows = model(**inputs).logits
        padding[side] = max(
            error(row[mask > 0], single)
            for row, mask, single in zip(rows, inputs["attention_mask"], singles, strict=True)
        )
    return {
        "dtype": str(model.dtype),
        "logits": error(plain.logits, logits),
        "cached": error(cached.logits, logits),
        "loss": error(plain.loss, target),
        "padding": padding,
        "stepwise": [stepwise(model, prompt) for prompt in PROMPTS] if decodes else None,
        "generated": generated(model, PROMPTS) if decodes else None,
        "module": type(model).__module__,
    }


def message(function: Any, *args: Any, **kwargs: Any) -> str | None:
    try:
        function(*args, **kwargs)
    except ValueError as raised:
        return str(raised)
    return None


@torch.no_grad()
def more(folder: str, tied_folder: str, scratch: Path) -> dict[str, Any]:
    """What need not be seen for every kind."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    model, half = load(folder), load(folder, dtype=torch.bfloat16)
    buffers = {str(buffer.dtype) for _, buffer in half.named_buffers()}
    tied = load(tied_folder)
    tied.save_pretrained(scratch / "again")
    again = load(str(scratch / "again"))
    ids = torch.tensor([PROMPTS[0]])
    packed = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    places = torch.tensor([[*range(len(PROMPTS[0])), *range(len(PROMPTS[1]))]])
    places_of = sys.modules[type(model).__module__].places  # type: ignore[attr-defined]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    inputs = padded(PROMPTS, "left")
    losses = [model(input_ids=torch.tensor([p]), labels=torch.tensor([p])).loss.item() * (len(p) - 1) for p in PROMPTS]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    last = model(**inputs, logits_to_keep=1).logits[:, 0]
    return {
        "half": sorted({str(parameter.dtype) for parameter in half.parameters()}),
        "buffers": sorted(buffers),
        "half_error": error(half(input_ids=ids).logits.double(), model(input_ids=ids).logits),
        "again": error(again(input_ids=ids).logits, tied(input_ids=ids).logits),
        "packed": error(
            model(input_ids=packed, position_ids=places).logits[0, len(PROMPTS[0]) :],
            model(input_ids=torch.tensor([PROMPTS[1]])).logits[0],
        ),
        "fresh_std": fresh.model.embed.weight.std().item(),
        "greedy": generated(model, PROMPTS),
        "chunked": generated(model, PROMPTS, prefill_chunk_size=2),
        "beams": generated(model, PROMPTS, 10, num_beams=4),
        "beams_uncached": generated(model, PROMPTS, 10, num_beams=4, use_cache=False),
        "loss": [model(**inputs, labels=labels).loss.item(), sum(losses) / sum(len(p) - 1 for p in PROMPTS)],
        "last": error(last, torch.stack([model(input_ids=torch.tensor([p])).logits[0, -1] for p in PROMPTS])),
        "places": [
            [None if x is None else x.tolist() for x in places_of(ids, mask, positions, past)]
            for mask, positions, past in (
                (None, None, 0),
                (None, None, 3),
                (torch.tensor([[0, 0, 1, 1, 1]]), None, 0),
                (torch.tensor([[1, 1, 0, 0, 0]]), None, 0),
                (torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), None, 2),
                (None, torch.tensor([[0, 1, 0, 1, 0]]), 0),
            )
        ],
        "refused": [
            message(model, input_ids=ids, inputs_embeds=torch.zeros(1, 5, 16)),
            message(model, input_ids=ids, attention_mask=torch.ones(1, 2)),
            message(model, input_ids=ids, past_key_values=DynamicCache()),
        ],
    }


def main() -> None:
    for name in ("configs", "models", "parallel", "trainer", "launch"):
        sys.modules[name] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    folders, closely, result = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    found: dict[str, Any] = {folder: facts(folder) for folder in folders}
    if closely:
        folder, tied = closely
        found["more"] = more(folder, tied, result.parent)
    found["modules"] = sorted(name for name in sys.modules if name.split(".")[0] in ("models", "configs"))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

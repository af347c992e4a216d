"""The README of an exported folder."""

from models.config import LMConfig
from models.plugin import plugins_in

TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [weft, custom_code]
---

# {title}

A causal language model trained with Weft, with {parameters} parameters ({dtype}), {layers} layers of width {width} and
a vocabulary of {vocab}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)
```

The folder is self-contained: it needs `torch`, `transformers` and `safetensors`, and nothing of Weft. The model is
computed by the very modules that it was trained with, copied here as `weft_*.py`; `config.json` holds their whole
config under `weft`.

| slot | kind | what it is |
|---|---|---|
{plugins}
"""


def human(count: int) -> str:
    """7,241,732,096 is "7.24 B"."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def model_card(title: str, config: LMConfig, parameters: int, dtype: str) -> str:
    rows = {}
    for plugin in plugins_in(config):
        about = (type(plugin).__doc__ or "").strip().partition("\n")[0]
        rows[plugin.slot, plugin.kind] = f"| {plugin.slot} | {plugin.kind} | {about} |"
    return TEXT.format(
        title=title,
        parameters=human(parameters),
        dtype=dtype,
        layers=len(config.expanded),
        width=config.d_model,
        vocab=f"{config.vocab_size:,}",
        plugins="\n".join(rows[key] for key in sorted(rows)),
    )

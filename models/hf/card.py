"""The README of an exported folder."""

from models.config import LMConfig
from models.plugin import plugins_in

TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

A causal language model trained with Weft, with {parameters} parameters ({dtype}), {layers} layers of width {width} and
a vocabulary of {vocab}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>"{arguments})
tokenizer = AutoTokenizer.from_pretrained("<this folder>"{arguments})  # if there is a tokenizer.json
```

{about}

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


def model_card(title: str, config: LMConfig, parameters: int, dtype: str, about: str, remote_code: bool) -> str:
    rows = {}
    for plugin in plugins_in(config):
        doc = (type(plugin).__doc__ or "").strip().partition("\n")[0]
        rows[plugin.slot, plugin.kind] = f"| {plugin.slot} | {plugin.kind} | {doc} |"
    return TEXT.format(
        tags="weft, custom_code" if remote_code else "weft",
        title=title,
        parameters=human(parameters),
        dtype=dtype,
        layers=len(config.expanded),
        width=config.d_model,
        vocab=f"{config.vocab_size:,}",
        arguments=", trust_remote_code=True" if remote_code else "",
        about=about,
        plugins="\n".join(rows[key] for key in sorted(rows)),
    )

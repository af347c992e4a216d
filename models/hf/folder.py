"""A folder in Hugging Face's format, opened by transformers, and whether its code may run.

A self-contained export brings code. It is run unasked only where it is, letter by letter, what this installation would
write for the folder's config: then it is our own. Other code runs if the user says so.
"""

import json
from pathlib import Path
from typing import Any

from configs.errors import sentence
from configs.structure import instantiate
from models.config import LMConfig
from models.hf.formats import SelfContained, sources_of

CONFIG = "config.json"


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError where config.json is no JSON object."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({sentence(error)}); export the model anew") from error
    if not isinstance(data, dict):
        raise ValueError(f"{folder / CONFIG} holds no JSON object; export the model anew")
    return data


def foreign(folder: Path, data: dict[str, Any]) -> str | None:
    """Why the code that the folder brings is not ours, or None: it is, or there is none."""
    if "auto_map" not in data:
        return None
    if not isinstance(data.get("weft"), dict):
        return f"{CONFIG} holds no model of Weft's"
    try:
        config: LMConfig = instantiate(LMConfig, data["weft"])
        files = sources_of(config).files
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"this Weft does not have its model ({sentence(error)})"
    if data["auto_map"] != SelfContained().config(config, {})["auto_map"]:
        return f"{CONFIG} names other classes than an export does"
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            return f"{name} is not what this Weft writes"
    return None


def load(folder: Path, device: str, trust: bool) -> Any:
    """The causal language model, in the type that it was saved in, in evaluation mode.

    trust: run the folder's code whatever it is. Raises ValueError for what does not load, and for code that is not
    trusted.
    """
    data = read_config(folder)
    if not trust and (reason := foreign(folder, data)):
        raise ValueError(
            f"{folder} brings code, which loading it runs, and {reason}; export it anew, or say --trust-remote-code if "
            "you trust who made it"
        )
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    code = {"trust_remote_code": True} if "auto_map" in data else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **code)
    except Exception as error:  # whatever its code or the library raises about what is in the folder
        raise ValueError(f"{folder} does not load in transformers ({sentence(error)}); export it anew") from error
    return model.to(device).eval()

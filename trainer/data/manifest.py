"""What stands beside prepared data: manifest.json, with what was asked for, what came of it, and how to check it."""

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest beside a .bin/.idx pair, or None when the pair was made elsewhere."""
    return manifest_of(Path(prefix).parent)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """None when the folder has no manifest. Raises ValueError when it cannot be read."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or prepare the data anew") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tokenizer"), dict):
        raise ValueError(f"{file} is no manifest of prepared data; restore it, or prepare the data anew")
    return manifest


def split_of(prefix: str) -> dict[str, Any] | None:
    """What the manifest says of one pair, if anything: documents, tokens, bytes and files."""
    splits = (read_manifest(prefix) or {}).get("splits")
    found = splits.get(Path(prefix).name) if isinstance(splits, dict) else None
    return found if isinstance(found, dict) else None

"""What stands beside prepared data: manifest.json."""

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest beside a .bin/.idx pair, or None when the pair was made elsewhere."""
    file = Path(prefix).parent / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

"""The source files that an exported model carries: the closure of its imports, as one flat folder.

`models/mixers/attention.py` becomes `weft_models_mixers_attention.py`, and every import of ours becomes a relative one,
because Hugging Face's loader copies only files that are imported as `from .name import`.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

OURS = ("configs", "models")
REQUIRED = frozenset({"torch", "transformers", "safetensors", "numpy"})  # what has to be there to load any model

# The files that transformers looks for keep the names that it expects.
NAMES = MappingProxyType(
    {"models.hf.configuration_weft": "configuration_weft", "models.hf.modeling_weft": "modeling_weft"}
)


class Sources(NamedTuple):
    """files: text by file name. optional: packages outside REQUIRED that some file imports."""

    files: dict[str, str]
    optional: frozenset[str]


def flat_name(module: str) -> str:
    """The name, without suffix, of a module in the exported folder."""
    return NAMES.get(module) or "weft_" + module.replace(".", "_")


def find(module: str) -> Path | None:
    """The file of `module`, or None when there is no such module. Imports packages only."""
    parent = module.rpartition(".")[0]
    if parent and ((above := find(parent)) is None or above.name != "__init__.py"):
        return None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


class Rewriter:
    """One file: its imports of ours made relative, its imports of optional packages put under `try`."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path
        self.source = path.read_text(encoding="utf-8")
        self.needs: set[str] = set()
        self.optional: set[str] = set()

    def refuse(self, node: ast.stmt, why: str) -> ValueError:
        return ValueError(f"{self.path}:{node.lineno}: {why}, so that the file cannot be exported")

    def base(self, node: ast.ImportFrom) -> str:
        """The absolute name of what stands behind `from`."""
        if not node.level:
            return node.module or ""
        package = self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def module_import(self, module: str, name: str) -> list[str]:
        # The loader copies only what it sees as `from .file import`, which the second line alone is not.
        self.needs.add(module)
        flat = flat_name(module)
        return [f"from .{flat} import __name__ as _  # noqa: F401", f"from . import {flat} as {name}"]

    def from_import(self, node: ast.ImportFrom) -> list[str]:
        base, names, lines = self.base(node), [], []
        for alias in node.names:
            if alias.name != "*" and find(f"{base}.{alias.name}") is not None:
                lines += self.module_import(f"{base}.{alias.name}", alias.asname or alias.name)
            else:
                names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        if names:
            if find(base) is None:
                raise self.refuse(node, f"it imports {base}, which does not exist")
            self.needs.add(base)
            lines.append(f"from .{flat_name(base)} import {', '.join(names)}")
        return lines

    def plain_import(self, node: ast.Import) -> list[str]:
        lines = []
        for alias in node.names:
            if alias.name.partition(".")[0] in OURS:
                if alias.asname is None:
                    raise self.refuse(node, f"`import {alias.name}` binds a package; write `from ... import ...`")
                lines += self.module_import(alias.name, alias.asname)
            else:
                lines.append(f"import {alias.name} as {alias.asname}" if alias.asname else f"import {alias.name}")
        return lines

    def lines_for(self, node: ast.Import | ast.ImportFrom) -> list[str] | None:
        """What replaces an import statement; None when it stays."""
        names = [self.base(node)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        tops = {name.partition(".")[0] for name in names}
        if tops & set(OURS):
            return self.from_import(node) if isinstance(node, ast.ImportFrom) else self.plain_import(node)
        if optional := tops - REQUIRED - sys.stdlib_module_names:
            # On the Hub the loader demands every package that a file imports outside of a `try`.
            self.optional |= optional
            return ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
        return None

    def rewrite(self) -> str:
        tree = ast.parse(self.source, filename=str(self.path))
        lines = self.source.encode().splitlines(keepends=True)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
            new = self.lines_for(node)
            if new is None:
                continue
            assert node.end_lineno is not None and node.end_col_offset is not None
            first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
            indent, rest = first[: node.col_offset], last[node.end_col_offset :]
            if indent.strip() or rest.lstrip().startswith(b";"):
                raise self.refuse(node, "an import shares its line with another statement")
            text = f"\n{indent.decode()}".join(new).encode()
            lines[node.lineno - 1 : node.end_lineno] = [indent + text + rest]
        return b"".join(lines).decode()


def collect(roots: Iterable[str], kinds: Iterable[str]) -> Sources:
    """The files of the modules `roots` and `kinds` and of all that they import, ready to be written to one folder.

    kinds: modules that define plug-ins; the modeling file imports them, so that they register.
    """
    kinds = sorted(set(kinds))
    files: dict[str, str] = {}
    optional: set[str] = set()
    waiting, seen = [*roots, *kinds], set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = find(module)
        if path is None:
            raise ValueError(f"module {module} has no source file, so that it cannot be exported")
        rewriter, name = Rewriter(module, path), flat_name(module) + ".py"
        if name in files:
            raise ValueError(f"module {module} and another one would both be exported as {name}; rename one of them")
        files[name] = rewriter.rewrite()
        optional |= rewriter.optional
        waiting += rewriter.needs
    imports = [f"from .{flat_name(module)} import __name__ as _  # noqa: E402, F401\n" for module in kinds]
    files[flat_name("models.hf.modeling_weft") + ".py"] += "\n# Importing a file registers its kinds.\n" + "".join(
        imports
    )
    return Sources(dict(sorted(files.items())), frozenset(optional))

"""YAML text to plain data and back: the safe subset, with the scalars of YAML 1.2.

PyYAML reads YAML 1.1, in which 1e-3 is text, `no` is false, 010 is 8 and 1:30 is 90. Here numbers are decimal, 1e-3 is
a number, only true and false are booleans, and a key that stands twice in a mapping is an error.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from configs.errors import ConfigError

INT = re.compile(r"[-+]?[0-9][0-9_]*$")
FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
RESOLVERS = (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", INT, "-+0123456789"),
    ("float", FLOAT, "-+0123456789."),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<$"), "<"),
)


class Loader(yaml.SafeLoader):
    """Reads the scalars above and refuses repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - not PyYAML's own table

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not a word; write it as text", key.start_mark
                )
            if key.value in seen:
                problem = f"the key {key.value!r} stands in lines {seen[key.value]} and {line} of one mapping; keep one"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - not PyYAML's own table

    def ignore_aliases(self, data: Any) -> bool:
        return True


def decimal(loader: Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


def inline(dumper: Dumper, data: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


for tag, pattern, first in RESOLVERS:
    for class_ in (Loader, Dumper):
        class_.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, list(first))
Loader.add_constructor("tag:yaml.org,2002:int", decimal)
Dumper.add_representer(list, inline)


def parse_yaml(text: str, name: str) -> Any:
    """Plain data. Raises ConfigError that names the file and the line."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        hint = (
            "" if isinstance(error, yaml.constructor.ConstructorError) else "; check quotes, brackets and indentation"
        )
        raise ConfigError(f"{where}: {error.problem or 'this is not YAML'}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: this is not YAML ({' '.join(str(error).split())})") from error


def dump_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)

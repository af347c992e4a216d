"""What a user is told about a config: one sentence that names the place, what was given, the rule and the way out."""

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be used. Its text is meant to be read by itself, without a traceback."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """ "did you mean heads? " where one of `known` is near, otherwise nothing."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1) or [
        name for name in names if name.lower() == str(given).lower()
    ]
    return f"did you mean {near[0]}? " if near else ""


def at(path: str, sentence: str) -> ConfigError:
    return ConfigError(f"{path}: {sentence}" if path else sentence)


def shown(value: Any) -> str:
    """A value as one would write it in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # Python writes no decimals of a whole number that is too long.
    text = hex(value) if isinstance(value, int) and value.bit_length() > 4096 else repr(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"


def sentence(error: BaseException) -> str:
    """An error as one line for a person; the system's own errors name the path and the way out."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}; free some, or write to a folder on another disk"
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; a folder is made there, so give a path where no file is in the way"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give a path that exists and that this user may read and write"
    return " ".join(str(error).split())

"""From text to tokens: `prepare` writes a folder with train and valid (.bin, .idx), the tokenizer and manifest.json.

Everything is made in OUT.partial and moved to OUT in one step, so that what has the name OUT is complete. What is done
in OUT.partial is kept when the work is interrupted, and the same call goes on from there:

    plan.json     what was asked for, and of which files
    scan/         one file per unit of work: its documents' number, size and smallest hashes
    tokenizer/    trained, or copied
    shards/       tokens per unit
    out/          what becomes OUT

Nothing in the result depends on the number of workers or on interruptions.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.data.job import Job
from trainer.data.manifest import FORMAT
from trainer.data.prepare_config import PrepareConfig
from trainer.data.sources import find_files, fingerprint
from trainer.data.workfolder import begin, discard, finished, has_shards, locked
from trainer.durable import sync_folder
from trainer.progress import say

__all__ = ["PrepareConfig", "prepare"]


def prepare(
    config: PrepareConfig, out: str | os.PathLike[str], console: Console | None = None, workers: int = 1
) -> dict[str, Any]:
    """Write the prepared data to folder `out`, or go on where an interrupted call stopped; returns the manifest.

    Raises ValueError for input that cannot be used, and where `out` holds anything but what this call would write.
    """
    console, out = console or Console(stderr=True), Path(out)
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    given = config.open_tokenizer()
    arguments = config.arguments(given)
    work = out.with_name(out.name + ".partial")
    if (done := finished(out, config, arguments)) is not None:
        say(console, f"{out} is already prepared with these arguments; nothing to do")
        discard(work)
        return done
    files = find_files(config.sources, config.suffixes_of_folders)
    with locked(work):
        begin(work, {"format": FORMAT, "arguments": arguments, "files": fingerprint(files)})
        try:
            manifest = Job(config, arguments, given, files, work, console, workers).run()
        except ValueError:
            if not has_shards(work):
                shutil.rmtree(work)
            raise
        (work / "out").rename(out)
        sync_folder(out.parent)
        shutil.rmtree(work)
    return manifest

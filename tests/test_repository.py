"""What every tracked file keeps to; the linters check the rest."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.contract.tiny import ALL_SLOTS

ROOT = Path(__file__).resolve().parents[1]
LINES = 350

# Split, so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
# A path that exists on one person's machine only. Longer words and URLs that contain such a part are fine.
PERSONAL = re.compile(r"(?<![\w.\-/])/(home|root|Users|work)/[\w.\-]+")
# What a link in Markdown leads to inside the repository, without the heading behind #.
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


def tracked() -> list[Path]:
    # The -c lets git read a checkout that belongs to another user, as in containers.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Path, relative to the root, of every tracked text file, and its text."""
    found = {}
    for file in tracked():
        data = file.read_bytes()
        if b"\0" not in data:
            found[file.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    return found


def places(texts: dict[str, str], pattern: re.Pattern[str], suffix: str = "") -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        if name.endswith(suffix)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_python_files_are_short(texts: dict[str, str]) -> None:
    lengths = {name: len(text.splitlines()) for name, text in texts.items() if name.endswith(".py")}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_nothing_is_left_unfinished(texts: dict[str, str]) -> None:
    assert places(texts, UNFINISHED) == []


def test_python_is_ascii_without_tabs(texts: dict[str, str]) -> None:
    assert places(texts, re.compile(r"[^\x20-\x7e]"), suffix=".py") == []


def test_no_path_of_one_machine(texts: dict[str, str]) -> None:
    assert places(texts, PERSONAL) == []


def pages_from(page: Path, texts: dict[str, str]) -> set[str]:
    """The pages that the links of `page` lead to; one to a folder leads to all that is in it."""
    found = set()
    for target in LINK.findall(texts[page.as_posix()]):
        place = os.path.normpath(page.parent / target)
        found |= {name for name in texts if name.endswith(".md") and (name == place or name.startswith(f"{place}/"))}
    return found


def test_every_page_can_be_reached_from_the_readme(texts: dict[str, str]) -> None:
    reached, waiting = set(), {"README.md"}
    while waiting:
        page = waiting.pop()
        reached.add(page)
        waiting |= pages_from(Path(page), texts) - reached
    assert {name for name in texts if name.startswith("docs/") and name.endswith(".md")} - reached == set()


def test_links_between_pages_lead_somewhere(texts: dict[str, str]) -> None:
    broken = [
        f"{name}: {target}"
        for name, text in texts.items()
        if name.endswith(".md")
        for target in LINK.findall(text)
        if not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert broken == []


def test_text_files_end_in_one_newline(texts: dict[str, str]) -> None:
    wrong = [name for name, text in texts.items() if text and (not text.endswith("\n") or text.endswith("\n\n"))]
    assert wrong == []


def test_the_readme_names_every_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {slot: set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", kinds))) for slot, kinds in rows}
    assert named == {slot.slot: set(slot.kinds()) for slot in ALL_SLOTS}

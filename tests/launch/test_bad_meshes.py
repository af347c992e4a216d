"""Random meshes, many of which cannot be: refused in one sentence, and what the sentence proposes works."""

import copy
import random
import re
from typing import Any

import pytest

from configs.structure import to_plain
from configs.validate import parse
from models.config import LMConfig
from parallel.check import MOST_RANKS, Settings, refuse_combination
from parallel.mesh import SCHEDULES, MeshConfig
from tests.contract.draws import draw
from trainer.config import RunConfig
from trainer.preflight import refuse_run

DEGREES = ("dp", "fsdp", "tp", "cp", "ep", "etp", "pp")


def refusal(data: dict[str, Any]) -> str | None:
    """Why a config cannot run; nothing is started to find out."""
    try:
        refuse_run(parse(RunConfig, data))
    except ValueError as error:
        return str(error)
    return None


def drawn(seed: int) -> dict[str, Any]:
    """A run of a random model on a random mesh."""
    generator = random.Random(seed)
    mesh: dict[str, Any] = {
        key: generator.choice((2, 2, 3, 4, 6, 8)) for key in generator.sample(DEGREES, generator.randint(1, 3))
    }
    if "pp" in mesh:
        mesh["schedule"] = generator.choice(SCHEDULES)
    if "cp" in mesh and generator.random() < 0.4:
        mesh["context"] = "ring"
    model = to_plain(draw(100 + seed % 40))
    if model["residual"].get("grid_bits"):
        model["residual"]["grid_bits"] = None  # which is about the type, and no mesh's
    return {
        "model": model,
        "run": {"dir": "x"},
        "data": {"train": "x", "sequence_length": generator.choice((8, 19))},
        "train": {
            "steps": 2,
            "global_batch": generator.choice((1, 2, 3, 4, 8, 12)),
            "micro_batch": generator.choice((1, 1, 2)),
        },
        "optim": {"kind": "adamw", "lr": 0.01},
        "mesh": mesh,
        "memory": {"kind": generator.choice(("none", "none", "full", "selective", "reversible"))},
    }


def followed(data: dict[str, Any], way: str, subject: str) -> dict[str, Any]:
    """The config after the first thing that a sentence says to do."""
    changed = copy.deepcopy(data)
    first = re.split(", or |, such as ", way)[0]
    if found := re.fullmatch(r"use (\d+)", first):
        changed["train"][subject.removeprefix("train.")] = int(found[1])
        return changed
    if "without a schedule" in first:
        changed["mesh"].pop("schedule")
    if found := re.fullmatch(r"leave (\w+) out", first):
        changed["mesh"].pop(found[1])
        return changed
    if found := re.search(r"use (one that can|another memory|depth full)", first):
        changed["memory"] = {"kind": "full"}
        return changed
    if found := re.search(r"use schedule (\w+)", first):
        changed["mesh"]["schedule"] = found[1]
        return changed
    changes = re.findall(r"([a-z_.]+)=(\w+)", first)
    assert changes, f"nothing to follow in {way!r}"
    for key, value in changes:
        place, _, name = key.rpartition(".")
        changed[place or "mesh"][name] = int(value) if value.isdecimal() else value
    return changed


def steps_out(data: dict[str, Any]) -> list[str]:
    """The sentences that lead to a config that can run, each from what the one before proposes."""
    said: list[str] = []
    while (sentence := refusal(data)) is not None:
        assert "\n" not in sentence and sentence not in said, [*said, sentence]
        said.append(sentence)
        subject, _, way = sentence.partition(" is ")[0], *sentence.rpartition("; ")[1:]
        data = followed(data, way, subject)
        assert len(said) < 8, said
    return said


@pytest.mark.parametrize("seed", [*range(0, 30, 5)])
def test_a_check_refuses_as_a_run_does(seed: int) -> None:
    for data in map(drawn, range(1000 + seed, 1005 + seed)):
        data["train"] |= {"global_batch": 4096, "micro_batch": 1}  # so that none lacks micro-batches, and most divide
        data["memory"] = {"kind": "none"}
        try:
            model, mesh = (parse(kind, data[name]) for kind, name in ((LMConfig, "model"), (MeshConfig, "mesh")))
        except ValueError:
            continue  # refused by the schema that both have
        data["train"]["global_batch"] *= mesh.replicate * mesh.shard
        if mesh.world_size > MOST_RANKS or (mesh.pp > 1 and 4096 % mesh.pp):
            continue
        try:
            refuse_combination(model, mesh, Settings())
        except ValueError as error:
            assert refusal(data) == f"mesh: {error}"
        else:
            assert refusal(data) is None


@pytest.mark.parametrize(
    "first", [0, 20, *(pytest.param(first, marks=pytest.mark.slow) for first in range(40, 300, 20))]
)
def test_what_a_refusal_proposes_works(first: int) -> None:
    refused = 0
    for seed in range(first, first + 20):
        data = drawn(seed)
        said = steps_out(data)
        refused += bool(said)
        # What is wrong with each degree, the batch, its number of micro-batches and memory is said one by one.
        degrees = sum(key in DEGREES for key in data["mesh"])
        assert len(said) <= degrees + 1 + ("pp" in data["mesh"]) + (data["memory"]["kind"] != "none"), said
    assert refused > 5


@pytest.mark.parametrize("key", DEGREES)
def test_one_wrong_degree_takes_two_steps_at_most(key: str) -> None:
    refused = 0
    for seed in range(2000, 2004):
        data = drawn(seed)
        data["train"] |= {"global_batch": 5040 * 8, "micro_batch": 1}
        for degree in (2, 5, 6, 7, 12):
            data |= {"mesh": {key: degree}, "memory": {"kind": "none"}}
            if key == "pp":
                data["mesh"]["schedule"] = SCHEDULES[(seed + degree) % len(SCHEDULES)]
            said = steps_out(data)
            refused += bool(said)
            assert len(said) <= 2, said
    assert (refused > 5) == (key not in ("dp", "fsdp")), "any number of data ranks will do"

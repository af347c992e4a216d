"""Generation with caches equals the forward pass step by step, for every kind."""

import argparse
import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch

from launch.commands.generate import COMMAND
from models.decoding import check_generates, refusals
from models.ffn.swiglu import SwiGLUConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from tests.contract import draws, tiny
from tests.contract.tiny import spread
from trainer.generate import choose, generate, row_generator

PROMPTS = [[3, 7, 1, 9, 4], [5, 2], [8, 8, 6, 1]]


@torch.no_grad()
def stepwise(model: LM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


CONFIGS = {f"{slot}-{kind}": tiny.of_kind(slot, kind) for slot, kind in tiny.every_kind()}
CONFIGS |= {f"drawn-{seed}": draws.draw(seed) for seed in range(4)}


@pytest.mark.parametrize("case", [case for case, config in CONFIGS.items() if not any(refusals(config))])
def test_prompts_of_different_lengths(case: str) -> None:
    model = spread(CONFIGS[case]).eval()
    expected = [stepwise(model, prompt, 5) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 5) == expected
    assert generate(model, PROMPTS[:1], 5) == expected[:1]


def test_it_ends_at_eos() -> None:
    model = spread(tiny.build())
    full = generate(model, PROMPTS, 6)
    eos = full[0][2]
    expected = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in full]
    assert generate(model, PROMPTS, 6, eos_id=eos) == expected
    assert generate(model, [], 6) == []
    assert model.training


def test_samples_depend_on_seed_and_place_alone() -> None:
    model = spread(tiny.build(mixer="gated_deltanet"))
    together = generate(model, PROMPTS, 6, temperature=1.0, seed=3)
    assert generate(model, PROMPTS[:1], 6, temperature=1.0, seed=3) == together[:1]
    assert generate(model, PROMPTS, 6, temperature=1.0, seed=4) != together


def test_top_p_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    generators = [row_generator(0, 0)]
    seen = {int(choose(logits, 1.0, 0.7, generators)) for _ in range(60)}
    assert seen == {1, 3}
    seen = [int(choose(logits, 1.0, 1.0, generators)) for _ in range(2000)]
    share = [seen.count(token) / len(seen) for token in range(4)]
    assert share == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.05)
    assert int(choose(logits, 0.0, 1.0, generators)) == 1


@dataclasses.dataclass(frozen=True)
class LooksAhead(AttentionConfig):
    causal: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Shares(SwiGLUConfig):
    batch_independent: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Forgets(AttentionConfig):
    incremental: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (
            {"mixer": LooksAhead(num_heads=2)},
            "mixer attention cannot generate: its output for a token depends on later",
        ),
        ({"ffn": Shares(hidden=8)}, "ffn swiglu cannot generate: its output for a sequence depends on the others"),
        ({"mixer": Forgets(num_heads=2)}, "mixer attention cannot generate: it cannot continue"),
    ],
)
def test_plugins_that_cannot_generate_say_so(layer: dict, sentence: str) -> None:
    config = tiny.build(num_layers=1)
    config = dataclasses.replace(config, layers={"A": dataclasses.replace(config.layers["A"], **layer)})
    with pytest.raises(ValueError, match=sentence):
        check_generates(config)
    with pytest.raises(ValueError, match=sentence):
        generate(LM(config), PROMPTS, 1)


@pytest.mark.parametrize(
    ("setting", "value", "way_out"),
    [("max_new_tokens", value, "such as 64") for value in (0, -1)]
    + [("temperature", value, "use 0 for the likeliest token") for value in (-0.1, math.inf, -math.inf, math.nan)]
    + [("top_p", value, "use 1 to sample among all") for value in (0.0, -0.5, 1.1, math.inf, math.nan)],
)
def test_settings_that_choose_no_token_are_refused(setting: str, value: float, way_out: str) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 1, setting: value}
    with pytest.raises(ValueError, match=rf"{setting} is {value}; it must be .*{way_out}"):
        generate(LM(tiny.build(num_layers=1)), [[1]], **settings)


def test_the_command_refuses_settings_before_it_reads_a_run() -> None:
    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    with pytest.raises(ValueError, match=r"temperature is nan"):
        COMMAND.run(parser.parse_args(["no-such-run", "text", "--temperature=nan"]))


def test_what_cannot_be_asked() -> None:
    model = spread(tiny.build(num_layers=1))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 1)
    model.prune(1, 1)
    with pytest.raises(ValueError, match="one stage of a pipeline"):
        generate(model, [[1]], 1)

"""Every way to be wrong gives one sentence with the key, what was given, the rule and the way out."""

import copy
import textwrap
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.load import load, merge, override
from configs.structure import to_plain
from configs.text import dump_yaml
from configs.validate import parse, validate
from models.config import LMConfig
from models.mixers.attention import AttentionConfig
from models.slots import FFNConfig, MixerConfig
from trainer.config import RunConfig
from trainer.optim.adamw import AdamWConfig

RUN: dict[str, Any] = {
    "model": {
        "vocab_size": 64,
        "d_model": 32,
        "layers": {
            "A": {"mixer": {"kind": "attention", "num_heads": 4}, "ffn": {"kind": "swiglu", "hidden": 48}},
        },
        "pattern": "AA",
    },
    "run": {"dir": "runs/x"},
    "data": {"train": "data/train", "sequence_length": 8},
    "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
    "optim": {"kind": "adamw", "lr": 1},
}


def refusal(change: str) -> str:
    """What is said of RUN with this override."""
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, merge(RUN, override(change, RUN)))
    return str(caught.value)


def test_a_valid_run() -> None:
    before = copy.deepcopy(RUN)
    config = parse(RunConfig, RUN)
    assert before == RUN
    assert config.model.layers["A"].mixer == AttentionConfig(num_heads=4)
    assert config.optim == AdamWConfig(lr=1.0, betas=(0.9, 0.95))
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert parse(RunConfig, to_plain(config)) == config
    assert parse(RunConfig, config) is config


ATTENTION = "num_heads, num_kv_heads, head_dim, rope, rope_theta, rope_fraction, qk_norm, window, output_gate, qkv_bias"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        # unknown keys
        (
            "model.layers.A.mixer.num_head=8",
            f"model.layers.A.mixer.num_head: unknown key; did you mean num_heads? attention takes {ATTENTION}",
        ),
        (
            "modle={}",
            "modle: unknown key; did you mean model? the config takes model, run, data, train, optim, schedule, mesh, "
            "memory, engine, kernels",
        ),
        (
            "mesh.zzz=2",
            "mesh.zzz: unknown key; mesh takes dp, fsdp, hsdp, tp, cp, context, ep, etp, ep_local, ep_chunks, pp, "
            "schedule, stages, reshard, overlap",
        ),
        ("model.residual={kind: plain, n: 2}", "model.residual.n: unknown key; plain takes no keys"),
        # missing keys and kinds
        (
            "model.layers.A.ffn={kind: moe, hidden: 1}",
            "model.layers.A.ffn: num_experts is missing; moe needs it, a whole number",
        ),
        ("model.norm={eps: 1}", "model.norm: kind is missing; write kind: and one of none, peri, post, pre"),
        (
            "model.norm={kind: per}",
            "model.norm.kind: unknown norm kind 'per'; did you mean 'peri'? the kinds are none, peri, post, pre",
        ),
        ("model.norm={kind: 3}", "model.norm.kind: 3 is not text; the kinds are none, peri, post, pre"),
        # an entry that an override makes by mistake
        (
            "model.layers.B.mixer.num_heads=4",
            "model.layers.B: ffn is missing; model.layers.B needs it, kind: and one of "
            f"{', '.join(FFNConfig.kinds())}; if another was meant, model.layers has A",
        ),
        # mappings
        ("model.norm=pre", "model.norm: 'pre' is not a mapping; write kind: and one of none, peri, post, pre"),
        ("model.layers.A=3", "model.layers.A: 3 is not a mapping; write a mapping with mixer, ffn, norm"),
        ("model.layers.A=null", "model: pattern 'AA' uses 'A', which layers does not define; layers defines nothing"),
        (
            "model.layers.B={mixer: {kind: attention, num_heads: 2}, ffn: {kind: swiglu, hidden: 8}}",
            "model: layers defines 'B', which pattern 'AA' never uses; use it, or take it out with model.layers.B=null",
        ),
        (
            "model.layers=[1]",
            "model.layers: [1] is not a mapping; write key: value pairs, each value a mapping with mixer, ffn, norm",
        ),
        # leaves
        (
            "model.layers.A.mixer.num_heads='8'",
            "model.layers.A.mixer.num_heads: '8' is not a whole number; write 8 without quotes",
        ),
        ("train.steps=ten", "train.steps: 'ten' is not a whole number"),
        ("optim.lr=nan", "optim.lr: 'nan' is not a number, such as 0.001"),
        ("train.steps=1000.0", "train.steps: 1000.0 is not a whole number; write 1000"),
        ("train.steps=2.5", "train.steps: 2.5 is not a whole number"),
        ("train.steps=true", "train.steps: true is not a whole number"),
        ("train.steps=null", "train.steps: null is not a whole number"),
        ("train.log_every=null", "train.log_every: null is not a whole number; the default of log_every is 1"),
        (
            "model.layers.A.mixer.window=all",
            "model.layers.A.mixer.window: 'all' is not a whole number or null; the default of window is null",
        ),
        ("model.tie_embeddings=1", "model.tie_embeddings: 1 is not true or false; write true"),
        (
            "model.tie_embeddings='true'",
            "model.tie_embeddings: 'true' is not true or false; write true without quotes",
        ),
        ("optim.lr=true", "optim.lr: true is not a number, such as 0.001"),
        ("run.dir=3", 'run.dir: 3 is not text; write it in quotes, "3"'),
        (
            "model.layers.A.mixer.rope=hald",
            "model.layers.A.mixer.rope: 'hald' is no choice; did you mean half? "
            "the choices are half, interleaved, none",
        ),
        (
            "schedule.kind=Cosine",
            "schedule.kind: unknown schedule kind 'Cosine'; did you mean 'cosine'? "
            "the kinds are constant, cosine, linear, wsd",
        ),
        # lists
        ("optim.betas=0.9", "optim.betas: 0.9 is not a list; write a list of 2: a number, a number"),
        ("optim.betas=[0.9]", "optim.betas: [0.9] has 1 elements; write a list of 2: a number, a number"),
        (
            "optim.betas=[a, 1]",
            "optim.betas.0: 'a' is not a number; the default of betas is [0.9, 0.95]",
        ),
        # what dataclasses and rules refuse
        (
            "model.layers.A.mixer.num_kv_heads=3",
            "model.layers.A.mixer: num_heads 4 is not a positive multiple of num_kv_heads 3; change one",
        ),
        ("model.vocab_size=0", "model: vocab_size is 0; it must be at least 2"),
        ("optim.clip=0", "optim: clip is 0.0; it must be above 0, or null for no clipping"),
        (
            "optim.lr=.nan",
            "optim.lr: nan is not finite; write a number below 3.4e+38 in magnitude, the largest of float32, "
            "such as 0.001",
        ),
        ("optim.betas=[1, 0]", "optim: betas is [1.0, 0.0]; both must lie in [0, 1), such as [0.9, 0.95]"),
        ("schedule={kind: cosine, min_ratio: 2}", "schedule: min_ratio is 2.0; it must lie in [0, 1]"),
        ("data.train=d/train.bin", "data: train is 'd/train.bin'; leave the ending out, 'd/train' names both files"),
        ("run.dir=''", "run: dir is empty; name a folder, such as runs/first"),
        ("train.eval_every=-1", "train: eval_every is -1; it must be at least 0"),
        (
            "mesh.dp=3",
            "train.global_batch is 4, not a multiple of 3 data ranks x micro_batch 2 = 6; "
            "use 6, or another micro_batch",
        ),
        (
            "mesh.schedule=zbw",
            "mesh: schedule is 'zbw'; did you mean zbv? "
            "it is one of gpipe, 1f1b, interleaved, zero_bubble, zbv, dualpipev",
        ),
        (
            "mesh.schedule=zbv",
            "mesh: schedule=zbv is for pipeline ranks, and pp is 1; leave schedule out, or give pp too",
        ),
        ("mesh.dp=2000000", "mesh: dp is 2000000; a mesh has at most 1048576 ranks"),
        ("mesh={dp: 2048, tp: 2048}", "mesh: the degrees multiply to 4194304 ranks; a mesh has at most 1048576"),
        (
            "model.repeat=2049",
            "model: pattern of 2 letters x repeat 2049 is 4098 layers; at most 4096 can be built, so use fewer",
        ),
        (
            "model.vocab_size=1000000000000000000",
            "model: vocab_size x d_model 1000000000000000000 x 32 is too large, "
            "a tensor holds fewer than 2**60 elements; use smaller sizes",
        ),
        (
            "train.steps=1000000000000000000",
            "train.steps 1000000000000000000 x train.global_batch 4 x data.sequence_length 8 is 2**63 tokens or more, "
            "which cannot be counted; use smaller ones",
        ),
        (
            "model={pattern: AAA, depth: {kind: skip_middle}}",
            "model: depth skip_middle pairs layer l with layer L-1-l, and L = 3 is odd; use 4 layers",
        ),
    ],
)
def test_one_sentence(change: str, sentence: str) -> None:
    assert refusal(change) == sentence


def test_null_takes_out_an_entry_that_a_base_gives(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(dump_yaml(RUN))
    layer = dump_yaml({"mixer": {"kind": "attention", "num_heads": 2}, "ffn": {"kind": "swiglu", "hidden": 8}})
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: base.yaml\nmodel:\n  pattern: B\n  layers:\n    A: null\n    B:\n" + textwrap.indent(layer, 6 * " ")
    )
    assert list(parse(RunConfig, load(child)).model.layers) == ["B"]
    new = "model.layers.C={mixer: {kind: attention, num_heads: 4}, ffn: {kind: swiglu, hidden: 8}}"
    overrides = [new, "model.layers.B=null", "model.pattern=C"]
    assert list(parse(RunConfig, load(child, overrides)).model.layers) == ["C"]
    # What a later override gives again is there again, and is what that override says alone.
    again = ["model.layers.C=null", new]
    assert list(parse(RunConfig, load(child, [*overrides, *again])).model.layers) == ["C"]
    assert parse(dict[str, int | None], {"a": None, "b": 1}) == {"a": None, "b": 1}


@pytest.mark.parametrize("key", ["model", "run", "data", "train", "optim"])
def test_missing_part(key: str) -> None:
    form = "kind: and one of adamw" if key == "optim" else "a mapping with "
    with pytest.raises(ConfigError, match=rf"^{key} is missing; the config needs it, {form}"):
        parse(RunConfig, {name: value for name, value in RUN.items() if name != key})


def test_an_unknown_mixer_lists_all() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MixerConfig, {"kind": "atention"}, "model.layers.A.mixer")
    kinds = ", ".join(MixerConfig.kinds())
    assert str(caught.value) == (
        f"model.layers.A.mixer.kind: unknown mixer kind 'atention'; did you mean 'attention'? the kinds are {kinds}"
    )


def test_an_example_is_the_way_out_of_a_required_leaf() -> None:
    example = AttentionConfig.example["num_heads"]
    with pytest.raises(ConfigError) as caught:
        parse(MixerConfig, {"kind": "attention", "num_heads": "eight"}, "m")
    assert str(caught.value) == f"m.num_heads: 'eight' is not a whole number, such as {example}"


def test_long_values_are_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(int, {"a": "b" * 200}, "x")
    assert len(str(caught.value)) < 120


def test_keys_are_text() -> None:
    with pytest.raises(ConfigError, match=r"^model: the key 1 is not text; write it in quotes$"):
        validate(LMConfig, {1: 2}, "model")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optim.lr", float("nan"), "nan is not finite"),
        ("optim.lr", float("-inf"), "-inf is not finite"),
        ("schedule.min_ratio", float("1e400"), "inf is not finite"),
        ("optim.lr", 3.5e38, "3.5e+38 is too large; write a number below 3.4e+38 in magnitude, the largest of float32"),
        ("optim.eps", 1e-38, "1e-38 is 0 in float32; write 0, or a number above 1.2e-38"),
        ("optim.lr", 10**400, "is out of range; write a whole number below 2**63"),
        ("run.seed", 2**63, "9223372036854775808 is out of range; write a whole number below 2**63"),
        ("run.seed", 1 << 20000, "is out of range; write a whole number below 2**63"),
    ],
    ids=["nan", "inf", "1e400", "3.5e38", "1e-38", "large_float", "seed", "too_long_to_write"],
)
def test_numbers_are_finite_and_fit(key: str, value: float, said: str) -> None:
    data = copy.deepcopy(RUN)
    section, name = key.split(".")
    data.setdefault(section, {"kind": "cosine"})[name] = value
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, data)
    assert str(caught.value).startswith(f"{key}: ") and said in str(caught.value) and "\n" not in str(caught.value)


def test_the_largest_whole_number_passes() -> None:
    assert parse(RunConfig, {**RUN, "run": {"dir": "x", "seed": 2**63 - 1}}).run.seed == 2**63 - 1


def test_the_kind_is_judged_before_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.kind: unknown optim kind 'lion'; the kinds are adamw, muon, sgd\b"):
        parse(RunConfig, {**RUN, "optim": {"kind": "lion", "momentum": 0.9}})


def test_a_kind_like_no_other_may_be_a_plugin_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEFT_PLUGINS", raising=False)
    with pytest.raises(ConfigError, match=r"the kinds are .*, swiglu, and WEFT_PLUGINS names no folder with more$"):
        parse(FFNConfig, {"kind": "mine"}, "model.layers.A.ffn")

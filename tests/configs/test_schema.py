"""The JSON schema says what validate says, as far as a schema can."""

from typing import Any

from configs.schema import field_words, of_files, schema
from models.mixers.attention import AttentionConfig
from models.slots import MixerConfig
from trainer.config import RunConfig, TrainConfig
from trainer.data.tasks.copying import CopyingConfig


def test_plug_ins_are_a_choice_of_kinds() -> None:
    got = schema(RunConfig, "run")
    mixer = got["$defs"]["LayerConfig"]["properties"]["mixer"]
    assert mixer["anyOf"] == [{"$ref": f"#/$defs/mixer.{kind}"} for kind in MixerConfig.kinds()]
    attention = got["$defs"]["mixer.attention"]
    assert attention["properties"]["kind"] == {"const": "attention"}
    assert attention["required"] == ["kind", "num_heads"]
    assert attention["additionalProperties"] is False
    assert attention["properties"]["rope"]["enum"] == ["half", "interleaved", "none"]
    assert attention["properties"]["rope_theta"] == {"type": "number", "default": 10000.0}
    assert attention["properties"]["window"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert attention["description"].startswith("Causal softmax attention")
    norm = got["$defs"]["LayerConfig"]["properties"]["norm"]
    assert norm["anyOf"][-1] == {"type": "null"} and norm["default"] is None


def test_every_reference_is_defined() -> None:
    got = schema(RunConfig, "run")

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*(references(item) for item in value.values()))
        return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()

    assert references(got) == {f"#/$defs/{name}" for name in got["$defs"]}


def test_defaults_are_plain_data() -> None:
    got = schema(RunConfig, "run")["$defs"]
    assert got["RunConfig"]["properties"]["schedule"]["default"]["kind"] == "cosine"
    assert got["optim.adamw"]["properties"]["betas"]["default"] == [0.9, 0.95]
    assert got["LMConfig"]["properties"]["residual"]["default"] == {"kind": "plain"}


def test_a_member_of_a_union_is_described_by_its_dataclass() -> None:
    got = schema(RunConfig, "run")["$defs"]
    train = got["DataConfig"]["properties"]["train"]
    source = {"type": "array", "items": {"$ref": "#/$defs/Source"}}
    assert train["anyOf"] == [{"type": "string"}, source, {"type": "null"}]
    assert train["description"].endswith("each with path and weight.")
    assert got["Source"]["required"] == ["path", "weight"] and got["Source"]["additionalProperties"] is False


def test_files_require_nothing_and_name_their_base() -> None:
    whole = schema(RunConfig, "run")
    got = of_files(whole)
    assert "required" in whole["$defs"]["RunConfig"]
    assert not any("required" in definition for definition in got["$defs"].values())
    assert got["$defs"]["RunConfig"]["properties"]["base"]["anyOf"][0] == {"type": "string"}
    assert "base" not in whole["$defs"]["RunConfig"]["properties"]
    own, all_of_it = got["$defs"]["LMConfig"]["properties"], whole["$defs"]["LMConfig"]["properties"]
    layers = {"anyOf": [all_of_it["layers"]["additionalProperties"], {"type": "null"}]}
    assert own == {**all_of_it, "layers": {**all_of_it["layers"], "additionalProperties": layers}}


def test_words_of_fields() -> None:
    words = field_words(AttentionConfig)
    assert words["window"] == "a query sees itself and the window - 1 tokens before it."
    assert words[""].startswith("Causal softmax attention (Vaswani")
    words = field_words(CopyingConfig)
    assert words[""].startswith("Copy a string of letters: its letters and the end")
    assert words["letters"].startswith("how many there are")
    words = field_words(TrainConfig)
    assert words["log_every"] == words["save_every"] and words["log_every"].startswith("in steps")

"""Every way to keep less of the forward pass gives the gradients of keeping all of it, on every mesh."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import memory as bench
from configs.structure import instantiate
from models.config import LMConfig
from models.memory.base import MemoryConfig
from models.memory.by_letter import ByLetterConfig
from models.memory.full import FullConfig
from models.memory.host import Host
from models.memory.none import NoneConfig
from models.memory.offload import Load, OffloadConfig, Trail
from models.memory.pareprop import PaRepropConfig
from models.memory.reversible import ReversibleConfig
from models.memory.sizes import Sizes, storage, stretches
from models.memory.sqrt import SqrtConfig
from models.memory.undone import DRIFT
from parallel import check
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build

EVERYDAY = ("fsdp=2", "ep=2,fsdp=4", "cp=2,pp=2,context=ring", "fsdp=2,reshard=false")
MESHES = ("dp=2", "fsdp=2", "fsdp=2,reshard=false", "hsdp=2x2", "hsdp=2x2,reshard=false", "tp=2", "tp=4", "cp=2",
          "ep=2", "pp=2", "pp=4", "fsdp=2,tp=2", "ep=2,fsdp=4", "cp=2,tp=2", "ep=2,cp=2", "fsdp=2,tp=2,pp=2",
          "cp=2,context=ring", "cp=2,tp=2,context=ring", "cp=2,pp=2", "cp=2,pp=2,context=ring",
          "pp=2,schedule=interleaved", "pp=2,schedule=gpipe", "fsdp=2,pp=2,schedule=interleaved",
          "ep=2,fsdp=2,pp=2,reshard=false", "ep=2,fsdp=2,pp=2", "ep=2,tp=2,pp=2")  # fmt: skip
SPLIT = ("pp=2,schedule=zbv", "pp=2,schedule=zero_bubble", "fsdp=2,pp=2,schedule=dualpipev")

# Entries that cross layers, routers with losses, statistics and a gate from the layer before, recurrences, draws.
MODELS: dict[str, dict[str, Any]] = {
    "reversible": {**HYBRID, "residual": "reversible", "values": "resformer", "depth": "stochastic"},
    "midpoint": {**HYBRID, "residual": "midpoint", "values": "resformer_learnable"},
    "multi_split": {**HYBRID, "residual": "multi_split", "values": "resformer"},
    "grid": {**HYBRID, "residual": {"kind": "reversible", "grid_bits": 44}},
    "universal": {"depth": "universal", "repeat": 4, "tie_embeddings": True},
    "hyper": {**HYBRID, "residual": "hyper", "depth": "skip_middle", "tie_embeddings": True},
    "mudd": {"residual": "mudd", "values": "resformer"},
}
UNDONE = ("reversible", "midpoint", "multi_split", "grid")
HOST = {"kind": "offload", "min_bytes": 0}
# Beside an example of every kind. Of by_letter_undone a chain of undone layers ends in front of one that is not.
OTHERS: dict[str, dict[str, Any]] = {
    "offload": HOST,
    "offload_full": {**HOST, "of": {"kind": "full"}},
    "by_letter_host": {"kind": "by_letter", "letters": {"A": HOST}, "others": {"kind": "selective"}},
    "by_letter_undone": {"kind": "by_letter", "letters": {"A": {"kind": "full"}}, "others": {"kind": "reversible"}},
}


def combinations() -> list[tuple[str, str]]:
    kinds = [kind for kind in {**MemoryConfig.kinds(), **OTHERS} if kind != "none"]
    undoing = ("reversible", "pareprop", "by_letter_undone")
    return [(model, kind) for model in MODELS for kind in kinds if kind not in undoing or model in UNDONE]


def everyday() -> list[tuple[str, str, str]]:
    """Every kind once, with models and meshes in turn."""
    models: dict[str, list[str]] = {}
    for model, kind in combinations():
        models.setdefault(kind, []).append(model)
    return [
        (of[turn % len(of)], kind, EVERYDAY[turn % len(EVERYDAY)]) for turn, (kind, of) in enumerate(models.items())
    ]


def memory(kind: str) -> MemoryConfig:
    data = OTHERS[kind] if kind in OTHERS else {"kind": kind, **MemoryConfig.of_kind(kind).example}
    return instantiate(MemoryConfig, data)


def compare(model: str, kind: str, mesh: str, pool: Pool) -> None:
    if "ep=" in mesh and "layers" not in MODELS[model]:
        mesh = mesh.replace("ep=2,", "").replace("ep=2", "dp=2")  # without experts
    if memory(kind).ahead:
        mesh = re.sub(r"[fh]sdp=\d+(x\d+)?", "dp=2", mesh).replace(",reshard=false", "")
    settings = check.Settings(memory=memory(kind))
    report = check.run(build(**MODELS[model]), MeshConfig.parse(mesh), settings, pool, timeout=120)
    assert report.ok, "\n".join([f"{model}, memory {kind} on {mesh}", *report.wrong[:10]])


def step(config: LMConfig, memory: MemoryConfig, dtype: torch.dtype = torch.float64) -> check.Step:
    """Two micro-batches on one process."""
    engine = Engine(config, Mesh.single(), seed=0, dtype=dtype, memory=memory)
    return check.take_step(engine, check.make_batch(config, MeshConfig(), check.Settings()), 2, None, check.Settings())


@pytest.mark.parametrize(("model", "kind"), combinations())
def test_one_process(model: str, kind: str) -> None:
    """To the error of float64 where the grid is off; statistics and losses are counted once."""
    config = build(**MODELS[model])
    plain, found = step(config, NoneConfig()), step(config, memory(kind))
    assert found.loss == plain.loss and found.norm == pytest.approx(plain.norm, rel=1e-12)
    for name, gradient in plain.gradients.items():
        assert check.error(found.gradients[name], gradient, floor=1e-6) < 1e-11, name
    assert {name for name in found.statistics if DRIFT not in name} == plain.statistics.keys()
    assert all(torch.equal(found.statistics[name], value) for name, value in plain.statistics.items())
    drift = [float(value[0]) for name, value in found.statistics.items() if DRIFT in name]
    undone = kind in ("reversible", "pareprop", "by_letter_undone")
    assert bool(drift) == (undone and model != "grid")
    assert all(value < 1e-24 for value in drift)


@pytest.mark.parametrize(("model", "kind", "mesh"), everyday())
def test_meshes(model: str, kind: str, mesh: str, pool: Pool) -> None:
    compare(model, kind, mesh, pool)


def sweep() -> list[tuple[str, str, str]]:
    """Every kind on every mesh, with a third of the models each."""
    pairs = [(index, pair) for index, pair in enumerate(combinations())]
    return [
        (*pair, mesh)
        for turn, mesh in enumerate((*MESHES, *SPLIT))
        for index, pair in pairs
        if (index + turn) % 3 == 0 and (mesh not in SPLIT or memory(pair[1]).splits_backward)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind", "mesh"), sweep())
def test_every_mesh(model: str, kind: str, mesh: str, pool: Pool) -> None:
    compare(model, kind, mesh, pool)


@pytest.mark.parametrize("kind", [ReversibleConfig(), PaRepropConfig()])
@pytest.mark.parametrize("residual", ["reversible", "midpoint", "multi_split"])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_odd_and_even_depths(depth: int, residual: str, kind: MemoryConfig) -> None:
    config = build(pattern="A" * depth, repeat=1, residual=residual)
    plain, found = step(config, NoneConfig()), step(config, kind)
    for name, gradient in plain.gradients.items():
        assert check.error(found.gradients[name], gradient) < 1e-12, name


def test_memory_does_not_grow_with_depth() -> None:
    """Undone layers: less than a hundredth of what a layer takes where all is kept. Stretches: less than layers."""
    most: dict[str, list[int]] = {}
    for layers in (8, 64):
        model = bench.model(layers)
        for kind in ("none", "selective", "full", "sqrt", "reversible", "offload", "offload_full"):
            memory(kind).apply(model)
            most.setdefault(kind, []).append(bench.measured(model)[0])
    growth = {kind: large - small for kind, (small, large) in most.items()}
    assert growth["reversible"] < 0.01 * growth["none"]
    assert growth["offload"] == growth["offload_full"] == 0
    assert growth["sqrt"] < growth["full"] < 0.1 * growth["none"] < growth["selective"] < 0.7 * growth["none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--memory nosuch", "argument --memory: 'nosuch' is none of none, selective, full,"),
        ("--layers 0", "argument --layers: '0' is no whole number from 1 to"),
        ("--layers 4,,8", "argument --layers: '' is no whole number"),
        ("--memory full --plot x.svg", "--plot draws times over those of none; add none to --memory"),
        ("--plot no/such/x.svg", "argument --plot: there is no folder no/such"),
    ],
)
def test_what_the_measurement_refuses(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["memory", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert message in capsys.readouterr().err


def test_depths_that_are_named_twice_are_measured_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["memory", *"--layers 1,1 --memory none,sqrt --rounds 1".split()])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert out.count("1 layers") == 2 and "of none's time, the median of the depths; published: 1.30 measured" in out


def test_stretches_are_as_long_as_pays() -> None:
    """Of 100 equal layers, each four times a state: two stretches of states and layers are least at 5 layers."""
    parts = stretches(Sizes(layers=(4,) * 100, states=(1,) * 100))
    assert {stop - start for start, stop in parts} == {5} and parts[0][0] == 0 and parts[-1][1] == 100
    uneven = stretches(Sizes(layers=(40, 1, 1, 1, 40, 1, 1, 1), states=(1,) * 8))
    assert uneven == [(0, 1), (1, 4), (4, 5), (5, 8)] or max(stop - start for start, stop in uneven) <= 4


def test_gradients_are_returned() -> None:
    """`torch.autograd.grad` sees them, and nothing is accumulated on the side."""
    config = build(residual="reversible")
    grads: list[tuple[Tensor, ...]] = []
    for kept in (NoneConfig(), ReversibleConfig()):
        engine = Engine(config, Mesh.single(), seed=0, dtype=torch.float64, memory=kept)
        batch, (model,) = check.make_batch(config, MeshConfig(), check.Settings()), engine.models
        out = model(batch.tokens, batch.targets, keys_B=batch.keys)
        parameters = list(model.parameters())
        grads.append(torch.autograd.grad(out.loss, parameters))
        assert all(parameter.grad is None for parameter in parameters)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-13)


def test_frozen_parameters() -> None:
    config = build(residual="reversible")
    engine = Engine(config, Mesh.single(), seed=0, dtype=torch.float64, memory=ReversibleConfig())
    (model,) = engine.models
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "layers.0.ffn.branch.ffn.up.weight")
    batch = check.make_batch(config, MeshConfig(), check.Settings())
    loss = model(batch.tokens, batch.targets, keys_B=batch.keys).loss
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"layers.0.ffn.branch.ffn.up.weight"}


@pytest.mark.parametrize(
    ("model", "mesh", "kept", "message"),
    [
        ({"residual": "hyper"}, "", ReversibleConfig(),
         "memory reversible undoes layers, and residual hyper cannot be undone; use one that can, such as midpoint, "
         "midpoint_smoothed, multi_split or reversible, or memory full"),
        ({"residual": "reversible", "depth": "skip_middle"}, "", ReversibleConfig(),
         "depth skip_middle looks at their inputs; use depth full, or memory full"),
        ({}, "", ByLetterConfig({"B": FullConfig()}),
         "letters has 'B', which is no layer of the pattern 'A'; use A, or take it out"),
        (HYBRID, "", ByLetterConfig({HYBRID["pattern"]: FullConfig()}),
         f"letters has {HYBRID['pattern']!r}, which is no layer of the pattern"),
        ({}, "", ByLetterConfig({"": FullConfig()}), "letters has '', which is no layer of the pattern"),
        ({}, "", ByLetterConfig({"A": ReversibleConfig()}), "residual plain cannot be undone"),
        ({"residual": "reversible"}, "pp=2,schedule=zbv", ByLetterConfig({"A": ReversibleConfig()}),
         "use schedule 1f1b or interleaved"),
        ({"residual": "reversible"}, "fsdp=2", ByLetterConfig({"A": PaRepropConfig()}),
         "memory by_letter runs a layer again before FSDP has gathered its parameters, and the mesh shards them over 2 "
         "ranks; use another memory, or a mesh without fsdp"),
        ({"residual": "reversible"}, "pp=2,schedule=zbv", ReversibleConfig(), "use schedule 1f1b or interleaved"),
    ],
)  # fmt: skip
def test_refusals(model: dict[str, Any], mesh: str, kept: MemoryConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check.refuse_combination(build(**model), MeshConfig.parse(mesh), check.Settings(memory=kept))


def test_a_compiled_layer_is_not_undone() -> None:
    with pytest.raises(ValueError, match="leave compile out"):
        check.refuse_combination(
            build(residual="reversible"), MeshConfig(dp=2), check.Settings(memory=ReversibleConfig(), compile=True)
        )


@pytest.mark.slow
def test_compiled_layers_run_again(pool: Pool) -> None:
    settings = check.Settings(memory=FullConfig(), compile=True)
    report = check.run(build(2), MeshConfig(fsdp=2), settings, pool, timeout=900)
    assert report.ok, report.wrong[:5]


def test_what_waits_comes_back_a_layer_ahead() -> None:
    """A layer's gradients wait for its own copies, and no layer's tensors stay beyond the layer in front."""
    events: list[str] = []
    fetch, leave = Load.fetch, Load.leave

    def fetched(load: Load) -> None:
        if load.here is None:
            events.append(f"fetch {loads.index(load)}")
        fetch(load)

    def left(load: Load) -> None:
        events.append(f"leave {loads.index(load)}")
        leave(load)

    def marked(_: Host) -> int:
        return [int(event.removeprefix("fetch ")) for event in events if event.startswith("fetch")][-1]

    def arrived(_: Host, mark: object) -> None:
        if f"wait {mark}" not in events:
            events.append(f"wait {mark}")

    loads: list[Load] = []
    engine = Engine(build(3), Mesh.single(), seed=0, memory=OffloadConfig(min_bytes=0))
    make = Trail.load
    batch = check.make_batch(engine.config, MeshConfig(), check.Settings())
    with (
        mock.patch.object(Trail, "load", lambda self, *args: loads.append(made := make(self, *args)) or made),
        mock.patch.object(Load, "fetch", fetched),
        mock.patch.object(Load, "leave", left),
        mock.patch.object(Host, "mark", marked),
        mock.patch.object(Host, "arrive", arrived),
    ):
        engine.step_gradients(batch, 1)
    assert events == ["fetch 2", "fetch 1", "wait 2", "leave 2", "fetch 0", "wait 1", "leave 1", "wait 0"]
    assert all(load.waiting for load in loads)


def test_parameters_and_small_tensors_stay() -> None:
    (model,) = Engine(build(2), Mesh.single(), seed=0, memory=OffloadConfig(min_bytes=0)).models
    own = {storage(parameter) for parameter in model.parameters()}
    moved: list[Tensor] = []
    batch = check.make_batch(model.config, MeshConfig(), check.Settings())
    with mock.patch.object(Host, "out", lambda self, x: moved.append(x) or x.clone()):
        model(batch.tokens, batch.targets, keys_B=batch.keys)
        assert moved and not own & {storage(x) for x in moved}
        sizes = sorted(x.nbytes for x in moved)
        moved.clear()
        OffloadConfig(min_bytes=sizes[-1]).apply(model)
        model(batch.tokens, batch.targets, keys_B=batch.keys)
    assert len(moved) == sizes.count(sizes[-1]) < len(sizes)


def test_values_that_memory_refuses() -> None:
    with pytest.raises(ValueError, match="of is sqrt, which has autograd save nothing to move; use one that does"):
        OffloadConfig(of=SqrtConfig())
    with pytest.raises(ValueError, match="memory sqrt is for all layers at once; use one for single layers, such as"):
        ByLetterConfig({"A": SqrtConfig()})

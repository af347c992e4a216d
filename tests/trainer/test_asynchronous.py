"""Pipelined backpropagation: late updates, what makes up for them, and that it learns."""

import dataclasses
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.structure import instantiate, to_plain
from models.config import LMConfig
from models.lm import LM
from models.params import initialize
from parallel.asynchronous import Parcels, cycles
from parallel.engine import Batch, Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.pipeline import Stage
from parallel.shelf import Shelf
from parallel.stages import plan
from parallel.testing import Pool
from tests.contract.tiny import build
from tests.trainer import runs
from trainer.config import RunConfig
from trainer.engines.asynchronous import AsynchronousEngine, DelayedSGD, Mitigation, spike
from trainer.engines.base import EngineConfig
from trainer.optim.sgd import SGDConfig
from trainer.preflight import load_run

MITIGATIONS: tuple[Mitigation, ...] = ("none", "spike", "prediction", "both")
COUNT, STEPS, LENGTH = 6, 3, 8
OPTIM = SGDConfig(lr=0.05, momentum=0.9, weight_decay=0.1, clip=None)
CONFIG = build(4, residual="hyper", values="resformer")


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("delay", [0, 1, 4, 16])
def test_a_compensated_gradient_has_moved_the_weights_as_far(delay: int, momentum: float) -> None:
    """One gradient at time 0, late by `delay`: from its arrival on, the weights are where undelayed SGD has them."""
    a, b = spike(momentum, delay)
    undelayed = weight = velocity = late = 0.0
    for time in range(40):
        late = momentum * late + (time == 0)
        undelayed -= late
        gradient = float(time == delay)
        velocity = momentum * velocity + gradient
        weight -= a * velocity + b * gradient
        if time >= delay:
            assert weight == pytest.approx(undelayed, abs=1e-12)


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (2 * COUNT, LENGTH + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def ranks(plain: dict[str, Any], pp: int, mitigation: Mitigation) -> dict[str, Tensor]:
    """Weights after some steps on the ranks of a pipeline."""
    config: LMConfig = instantiate(LMConfig, plain)
    engine = AsynchronousEngine(config, Mesh(MeshConfig(pp=pp)), seed=0, dtype=torch.float64)
    updater = engine.updates = DelayedSGD(engine, OPTIM, mitigation, COUNT)
    for step in range(STEPS):
        updater.begin(OPTIM.lr)
        engine.step_gradients(batch(step), COUNT)
        updater.step(OPTIM.lr)
    return engine.full_state()


class Queues:
    """The wire of stages that take turns in one process."""

    def __init__(self) -> None:
        self.under_way: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self.expected: dict[int, Parcels] = defaultdict(dict)
        self.here = 0

    def post(self, sent: Parcels, expected: Parcels) -> None:
        for stage, tensors in sent.items():
            self.under_way[self.here, stage].extend(x.clone() for x in tensors)
        self.expected[self.here] = expected

    def arrived(self) -> Parcels:
        here = self.expected[self.here].items()
        return {stage: [self.under_way[stage, self.here].popleft() for _ in likes] for stage, likes in here}


class Alone(Engine):
    """One stage, as an optimiser sees an engine."""

    def __init__(self, stage: Stage, config: LMConfig, mesh: Mesh) -> None:
        self.config, self.mesh, self.models, self.stages = config, mesh, [stage.model], [stage]


def one_process(config: LMConfig, pp: int, mitigation: Mitigation) -> dict[str, Tensor]:
    """The same by turns: within a cycle a stage gets what was sent in cycles before."""
    mesh, queues = Mesh.single(), Queues()
    sized = dataclasses.replace(mesh.config, pp=pp)
    made = []
    for planned in plan(LM(config), sized, 1):
        model = LM(config).double()
        initialize(model, 0)
        model.prune(planned.start, planned.stop)
        stage = Stage(model, planned, Shelf())
        updater = DelayedSGD(Alone(stage, config, mesh), OPTIM, mitigation, COUNT)
        made.append((stage, updater))
    mesh.config = sized
    for step in range(STEPS):
        whole = batch(step)
        sides = [
            {"tokens": tokens, "targets": targets}
            for tokens, targets in zip(whole.tokens.chunk(COUNT), whole.targets.chunk(COUNT), strict=True)
        ]
        running = []
        for stage, updater in made:
            updater.begin(OPTIM.lr)
            stage.scale = 1 / whole.targets.numel()
            updater.begin_step()
            running.append(cycles(stage, mesh, queues, updater, sides))
        going = True
        while going:
            for queues.here, one in enumerate(running):
                going = next(one, "done") != "done"
    return {name: x for stage, _ in made for name, x in stage.model.state_dict().items()}


@pytest.mark.parametrize("pp", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mitigation", MITIGATIONS)
def test_ranks_equal_stages_that_take_turns(mitigation: Mitigation, pp: int, pool: Pool) -> None:
    expected = one_process(CONFIG, pp, mitigation)
    for found in pool.run(ranks, pp, to_plain(CONFIG), pp, mitigation):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_the_mitigations_differ_where_gradients_are_late() -> None:
    found = [one_process(CONFIG, 2, mitigation) for mitigation in MITIGATIONS]
    first, last = "layers.0.ffn.branch.ffn.up.weight", "layers.3.ffn.branch.ffn.up.weight"
    for index, one in enumerate(found):
        for other in found[:index]:
            assert not torch.allclose(one[first], other[first], rtol=1e-6)
            assert not torch.allclose(one[last], other[last], rtol=1e-9), "its inputs and gradients are others'"


@pytest.mark.parametrize("mitigation", MITIGATIONS)
def test_one_micro_batch_in_a_step_is_synchronous_sgd(mitigation: Mitigation) -> None:
    """Nothing is late then. The velocity too, which a run may take along when it changes its engine."""
    found = []
    for build_updater in (lambda e: DelayedSGD(e, OPTIM, mitigation, 1), OPTIM.build):
        engine = Engine(CONFIG, Mesh.single(), seed=0, dtype=torch.float64)
        updater = build_updater(engine)
        for step in range(STEPS):
            if isinstance(updater, DelayedSGD):
                updater.begin(OPTIM.lr)
                updater.begin_step()
            engine.step_gradients(batch(step), 1)
            if isinstance(updater, DelayedSGD):
                with torch.no_grad():
                    updater.arrived(0)
            updater.step(OPTIM.lr)
        velocities = [updater.state(one)["momentum_buffer"] for one in engine.held()]
        found.append((engine.full_state(), velocities))
    for delayed, synchronous in zip(*found, strict=True):
        torch.testing.assert_close(delayed, synchronous, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare_data(tmp_path_factory.mktemp("asynchronous"))


def run_config(data: Path, folder: Path, pp: int = 1, **engine: Any) -> RunConfig:
    """Of 4 layers, with 8 micro-batches in a step, by SGD."""
    config = runs.run_config(data, folder, global_batch=8, micro_batch=1, steps=40, save_every=0)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, pattern="AAAA"),
        optim=SGDConfig(lr=0.3, momentum=0.9, weight_decay=0.0, clip=None),
        mesh=MeshConfig(pp=pp),
        engine=instantiate(EngineConfig, engine or {"kind": "native"}),
    )


@pytest.mark.slow
def test_it_learns_as_synchronous_sgd_does(data: Path, tmp_path: Path, pool: Pool) -> None:
    """Over four stages, whose first one's gradients are six micro-batches late of eight."""
    runs.run(config := run_config(data, tmp_path / "native"))
    begun, aim = losses(runs.records(config))
    assert aim < begun - 2
    found = {}
    for mitigation in ("none", "both"):
        config = run_config(data, tmp_path / mitigation, 4, kind="asynchronous", mitigation=mitigation)
        found[mitigation] = losses(pool.run(runs.run_through, 4, config)[0])[1]
    assert abs(found["none"] - aim) < 0.02 * (begun - aim), (begun, aim, found)
    assert abs(found["both"] - aim) < 0.5 * abs(found["none"] - aim), (begun, aim, found)


def losses(records: list[dict[str, float]]) -> tuple[float, float]:
    found = [record["train/loss"] for record in records if "train/loss" in record]
    return found[0], found[-1]


def test_it_resumes_bit_for_bit(data: Path, tmp_path: Path, pool: Pool) -> None:
    def config(name: str) -> RunConfig:
        made = run_config(data, tmp_path / name, 2, kind="asynchronous")
        return dataclasses.replace(made, train=dataclasses.replace(made.train, steps=6, log_every=1))

    whole = pool.run(runs.run_through, 2, config("whole"))[0]
    assert pool.run(runs.run_interrupted, 2, config("parts"), 3)[0] == whole


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mesh.pp=1"], "asynchronous is for pipeline ranks with one stage each, and the mesh is one process; use mes"),
        (["mesh.schedule=zbv"], "pipeline ranks with one stage each"),
        (["mesh.dp=2"], "pipeline ranks with one stage each"),
        (["optim={kind: adamw, lr: 0.1, clip: null}"], "has SGD's updates alone, and optim.kind is adamw; use optim.k"),
        (["optim.clip=1"], "use optim.clip=null, or use engine.kind=native"),
        (["train.dtype=bfloat16"], "use train.dtype=float32"),
        (["memory.kind=full"], "use memory none"),
        (["train.compile=true"], "leave train.compile out"),
        (["train.faults.policy=skip"], "use policy stop"),
        (["model.tie_embeddings=true"], "embed.weight is on several; use untied weights"),
        (["engine.mitigation=some"], "mitigation"),
    ],
)
def test_what_it_cannot_run(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run("configs/debug_asynchronous.yaml", overrides)

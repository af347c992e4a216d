"""Compiled layers compute what eager ones do, whatever a layer is made of and wherever it runs."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from models.config import LMConfig
from models.ffn.dispatch import LocalDispatch
from models.lm import LM
from models.params import initialize
from parallel import check, compiled
from parallel.check import Settings, error, make_batch, take_step
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.compilers import needs_compiler
from tests.contract.tiny import build, plain

# torch's own, while it traces what derives from autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@needs_compiler
def test_layers_share_one_compilation_and_compute_the_same():
    config = build(num_layers=3, norm="peri")
    settings = Settings(micro_batches=2, packed=False)
    batch = make_batch(config, MeshConfig(), settings)
    counters.clear()
    eager, compiled = (
        take_step(Engine(config, Mesh.single(), seed=0, dtype=torch.float64, compile=how), batch, 2, None, settings)
        for how in (False, True)
    )
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-12)
    wrong = {name: e for name, g in eager.gradients.items() if (e := error(compiled.gradients[name], g)) > 1e-9}
    assert not wrong


@pytest.mark.slow
@needs_compiler
def test_any_number_of_picks_is_one_compilation() -> None:
    """MoE++ multiplies other numbers of rows in every step."""
    model, rows = LM(build(num_layers=1, ffn="moe_plus_plus")).bfloat16(), set[int]()
    initialize(model, seed=0)
    dispatch = next(module for module in model.modules() if isinstance(module, LocalDispatch))
    permute = dispatch.permute.call

    def counted(x_ND: Tensor, places_NK: Tensor, number: int) -> Tensor:
        rows.add(number)
        return permute(x_ND, places_NK, number)

    dispatch.permute.call = counted
    compiled.compile_layers(model)
    counters.clear()
    graphs = []
    for seed in range(6):
        tokens = torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(rows) > 3 and graphs[0] == graphs[-1]


@pytest.mark.slow
@needs_compiler
def test_any_number_of_rows_travels(pool: Pool) -> None:
    """More micro-batches, each with other numbers, than torch would compile for."""
    settings = Settings(compile=True, micro_batches=compiled.VARIANTS + 4)
    report = check.run(build(num_layers=1, ffn="moe_plus_plus"), MeshConfig(dp=2, ep=2), settings, pool)
    assert report.ok, report.wrong


def test_a_machine_without_a_compiler_is_refused_in_a_sentence(monkeypatch):
    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler.*install g\+\+"):
        compiled.refuse_compile("cpu")
    compiled.refuse_compile("cuda")


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv", "dualpipev"])
def test_schedules_that_would_lose_gradients_are_refused(schedule: str) -> None:
    mesh = MeshConfig(pp=2, schedule=schedule)
    with pytest.raises(ValueError, match=rf"under schedule {schedule}, .* use schedule interleaved or 1f1b"):
        check.run(build(), mesh, Settings(compile=True))


MIXED = build(
    pattern="GA",
    repeat=2,
    layers={
        "G": {"mixer": plain("mixer", "gated_deltanet"), "ffn": plain("ffn", "swiglu")},
        "A": {"mixer": plain("mixer", "attention"), "ffn": plain("ffn", "moe")},
    },
    residual="hyper",
    values="resformer",
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("depth", "residual"), [("universal", "plain"), ("universal", "desync"), ("universal_act", "plain")]
)
def test_a_block_that_repeats(depth: str, residual: str) -> None:
    config = build(depth=depth, ffn="moe", norm="peri", residual=residual)
    batch = make_batch(config, MeshConfig(), settings := Settings(micro_batches=2))
    eager, compiled = (
        take_step(Engine(config, Mesh.single(), seed=0, dtype=torch.float64, compile=how), batch, 2, None, settings)
        for how in (False, True)
    )
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-12)
    wrong = {name: e for name, g in eager.gradients.items() if (e := error(compiled.gradients[name], g)) > 1e-9}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(960)
@needs_compiler
@pytest.mark.parametrize(
    "mesh", ("fsdp=2", "tp=2", "cp=2", "ep=2", "pp=2", "fsdp=2,tp=2", "fsdp=2,pp=2,schedule=interleaved")
)
@pytest.mark.parametrize("config", (build(residual="mudd", depth="skip_middle"), MIXED), ids=("mudd", "mixed"))
def test_meshes(config: LMConfig, mesh: str, pool: Pool):
    if config is not MIXED and "ep" in mesh:
        pytest.skip("no experts")
    report = check.run(config, MeshConfig.parse(mesh), Settings(compile=True), pool, timeout=900)
    assert report.ok, report.wrong

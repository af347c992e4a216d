"""Text from a model whose layers are on several ranks: what one process writes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.structure import instantiate, to_plain
from models.config import LMConfig
from parallel import check
from parallel.decoding import Relay
from parallel.engine import Engine
from parallel.mesh import Mesh, MeshConfig
from parallel.testing import Pool
from tests.contract.tiny import HYBRID, build
from trainer.generate import OwnDecoder, decode

PROMPTS = [[1, 5, 3], [7], [2, 2, 9, 11, 4]]
MODELS = {
    "hybrid": build(**HYBRID, residual="hyper", values="resformer_learnable", tie_embeddings=True),
    "mudd": build(residual="mudd", depth="skip_middle", values="svformer"),
    "moa": build(mixer="moa", residual="ladder", values="neutreno"),
    "universal": build(depth="universal_act", mixer="mla"),
}


def logits(plain: dict[str, Any], mesh_config: MeshConfig) -> list[Tensor]:
    """Behind the prompts, and behind some more tokens."""
    config = instantiate(LMConfig, plain)
    mesh = Mesh(mesh_config)
    engine = Engine(config, mesh, seed=0, dtype=torch.float64)
    engine.load_full_state(check.shaken(engine.full_state(), 0))
    with torch.no_grad():
        decoder = OwnDecoder(Relay(engine.stages, mesh) if engine.stages else engine.models[0], "cpu")
        found = [decoder.start(PROMPTS)]
        found += [decoder.advance(torch.tensor([token, token + 1, 3])) for token in (4, 8, 1)]
        written = decode(decoder, PROMPTS, 5, temperature=1.0, seed=3)
    return [*found, torch.tensor(written)]


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,schedule=interleaved", "pp=2,schedule=zbv", "pp=4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_writes_what_one_process_writes(name: str, mesh: str, pool: Pool) -> None:
    config, mesh_config = to_plain(MODELS[name]), MeshConfig.parse(mesh)
    expected = pool.run(logits, 1, config, MeshConfig())[0]
    for rank in pool.run(logits, mesh_config.world_size, config, mesh_config):
        assert torch.equal(rank[-1], expected[-1])
        for got, wanted in zip(rank, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)

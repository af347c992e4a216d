"""Every layer uses its own values."""

import dataclasses

from models.context import LayerContext
from models.slots import Values, ValuesConfig


@dataclasses.dataclass(frozen=True)
class OwnValues(ValuesConfig, kind="own"):
    """No exchange of values between layers."""

    changes = False

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        return Values()

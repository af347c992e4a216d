"""The recurrences that a mixer's core runs over the sequence, told where documents begin and which part of it is here.

Shape suffixes: B batch, T sequence, S stretches of the whole sequence, J value heads, K key and V value width, `...`
channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.kernels.diagonal import scan, scan_pairs, times_pairs
from models.kernels.linear.choice import Recurrence, SlotRecurrence
from models.kernels.linear.passing import passing
from models.kernels.linear.recurrent import recurrent
from models.sequence_group import SequenceGroup

Rule = Callable[..., tuple[Tensor, Tensor]]  # as `Recurrences.__call__`
Times = Callable[[Tensor, Tensor], Tensor]


class Recurrences:
    """Of whole sequences. documents_BT: None where each row is one document. before_B1: that of the token in front, -1
    for none. matrices, slots: how those of matrices are computed, without and with decays of value channels."""

    def __init__(
        self,
        documents_BT: Tensor | None,
        before_B1: Tensor | None,
        matrices: Recurrence | None = None,
        slots: SlotRecurrence | None = None,
    ) -> None:
        self.documents_BT, self.before_B1 = documents_BT, before_B1
        self.matrices, self.slots = matrices, slots

    def __call__(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTJV: Tensor,
        g: Tensor | None = None,
        beta_BTJ: Tensor | None = None,
        *,
        scale: float,
        value_g_BTJV: Tensor | None = None,
        state_BJKV: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of matrices; see `models.kernels.linear.recurrent`."""
        decay = {} if value_g_BTJV is None else {"value_g_BTJV": value_g_BTJV}
        return self.form(k_BTHK, value_g_BTJV)(
            q_BTHK,
            k_BTHK,
            v_BTJV,
            g,
            beta_BTJ,
            scale=scale,
            documents_BT=self.documents_BT,
            state_BJKV=self.state_before(k_BTHK, v_BTJV, g, beta_BTJ, value_g_BTJV, state_BJKV),
            **decay,
        )

    def form(self, k_BTHK: Tensor, value_g_BTJV: Tensor | None) -> Rule:
        """What computes a recurrence of matrices. One token is decoded by the definition, whatever a run chose."""
        if k_BTHK.shape[1] == 1:
            return recurrent
        operation = self.matrices if value_g_BTJV is None else self.slots
        assert operation is not None, "a mixer with a recurrence of matrices holds its `Recurrence` or `SlotRecurrence`"
        return operation.call

    def state_before(
        self,
        k_BTHK: Tensor,
        v_BTJV: Tensor,
        g: Tensor | None,
        beta_BTJ: Tensor | None,
        value_g_BTJV: Tensor | None,
        past_BJKV: Tensor | None,
    ) -> Tensor | None:
        """What a recurrence of matrices starts from. past: what was decoded before."""
        return past_BJKV

    def scan(self, decay_BT: Tensor, x_BT: Tensor, state_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of vectors; see `models.kernels.diagonal`."""
        return scan(decay_BT, x_BT, self.documents_BT, state_B)

    def scan_pairs(self, decay_BT2: Tensor, x_BT2: Tensor, state_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of vectors of complex numbers."""
        return scan_pairs(decay_BT2, x_BT2, self.documents_BT, state_B2)

    def starts(self, x_BT: Tensor) -> Tensor:
        """[B, T]: the first tokens of documents. x: anything with those first dimensions."""
        ids_BT = self.documents_BT
        if ids_BT is None:
            ids_BT = torch.zeros(x_BT.shape[:2], dtype=torch.int64, device=x_BT.device)
        before_B1 = torch.full_like(ids_BT[:, :1], -1) if self.before_B1 is None else self.before_B1
        return (ids_BT != torch.cat([before_B1, ids_BT[:, :-1]], 1)) & (ids_BT >= 0)


class SpreadRecurrences(Recurrences):
    """Of stretches of sequences whose others are elsewhere, a row each.

    What a stretch makes of the state in front of it is through * state + final. All stretches find theirs at once; from
    those of the stretches before it each has the state that it goes on from (Sun et al., LASP-2, arXiv 2502.07563, for
    plain writes).
    """

    def __init__(
        self,
        documents_BT: Tensor | None,
        before_B1: Tensor | None,
        group: SequenceGroup,
        matrices: Recurrence | None = None,
        slots: SlotRecurrence | None = None,
    ) -> None:
        super().__init__(documents_BT, before_B1, matrices, slots)
        self._group = group

    def state_before(
        self,
        k_BTHK: Tensor,
        v_BTJV: Tensor,
        g: Tensor | None,
        beta_BTJ: Tensor | None,
        value_g_BTJV: Tensor | None,
        past_BJKV: Tensor | None,
    ) -> Tensor:
        assert past_BJKV is None, "decoding does not run where a sequence is spread out"
        form = self.form(k_BTHK, value_g_BTJV)
        through, final_BJKV = passing(k_BTHK, v_BTJV, g, beta_BTJ, value_g_BTJV, self.documents_BT, form)
        return self._before(through, final_BJKV, torch.mul if beta_BTJ is None else torch.matmul)

    def scan(self, decay_BT: Tensor, x_BT: Tensor, state_B: Tensor | None) -> tuple[Tensor, Tensor]:
        assert state_B is None, "decoding does not run where a sequence is spread out"
        _, final_B = super().scan(decay_BT, x_BT, None)
        _, through_B = super().scan(decay_BT, torch.zeros_like(x_BT), torch.ones_like(final_B))
        return super().scan(decay_BT, x_BT, self._before(through_B, final_B, torch.mul))

    def scan_pairs(self, decay_BT2: Tensor, x_BT2: Tensor, state_B2: Tensor | None) -> tuple[Tensor, Tensor]:
        assert state_B2 is None, "decoding does not run where a sequence is spread out"
        _, final_B2 = super().scan_pairs(decay_BT2, x_BT2, None)
        one = final_B2.new_tensor((1, 0)).expand_as(final_B2)
        _, through_B2 = super().scan_pairs(decay_BT2, torch.zeros_like(x_BT2), one)
        return super().scan_pairs(decay_BT2, x_BT2, self._before(through_B2, final_B2, times_pairs))

    def starts(self, x_BT: Tensor) -> Tensor:
        if self.before_B1 is None:
            # Of rows that are one document each, the first stretch alone has no token in front of it.
            ids_BT = torch.zeros(x_BT.shape[:2], dtype=torch.int64, device=x_BT.device)
            self.before_B1 = self._group.before(ids_BT, 1, -1)
        return super().starts(x_BT)

    def _before(self, through_B: Tensor, final_B: Tensor, times: Times) -> Tensor:
        """The state in front of each stretch that is here."""
        goes_on_B = self._goes_on(final_B)
        # A document that begins with a stretch passes nothing on from before it, to the stretches behind neither.
        through_B = through_B * goes_on_B.view(-1, *(1,) * (through_B.dim() - 1))
        through_SB, final_SB = self._group.everyone(through_B), self._group.everyone(final_B)
        state_B = torch.zeros_like(final_SB[0])
        states = []
        for part in range(len(final_SB)):
            states.append(state_B)
            state_B = times(through_SB[part], state_B) + final_SB[part]
        return self._group.own(torch.stack(states)) * goes_on_B.view(-1, *(1,) * (final_B.dim() - 1))

    def _goes_on(self, x_B: Tensor) -> Tensor:
        """[B]: whether the first token of a stretch is of the document before it, as padding always is. x: anything of
        that batch."""
        if self.documents_BT is None or self.before_B1 is None:
            return torch.ones(x_B.shape[0], dtype=torch.bool, device=x_B.device)
        first_B = self.documents_BT[:, 0]
        return (first_B == self.before_B1[:, 0]) | (first_B < 0)

"""Which processes of a run hold up the others, from what each says of itself, as one sentence."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from trainer.whereabouts import TRAINING, Report

ONE = MappingProxyType({"is": "is", "was": "was", "does": "does", "stays": "stays"})
SEVERAL = MappingProxyType({"is": "are", "was": "were", "does": "do", "stays": "stay"})


@dataclasses.dataclass(frozen=True)
class Cause:
    """The ranks that hold up the others, what they do in words, and what a person may do about it."""

    ranks: list[int]
    words: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known once a run cannot go on.

    reports: the last of every rank that has made one. silent: ranks whose reports no longer change. ended: ranks that
    their launcher has seen die, each with the signal. activity: what cannot go on. timeout: seconds that processes
    waited, None where a connection broke.
    """

    reports: Mapping[int, Report]
    silent: Collection[int] = ()
    ended: Mapping[int, str] = dataclasses.field(default_factory=dict)
    activity: str = TRAINING
    timeout: float | None = None

    def cause(self) -> Cause | None:
        """None where no rank differs from the others."""
        alive = {rank: report for rank, report in self.reports.items() if rank not in self.silent}
        if self.ended:
            signals = sorted(set(self.ended.values()))
            memory = " (the system does that where memory runs out)" if "SIGKILL" in signals else ""
            return Cause(sorted(self.ended), f"{{was}} ended by {' and '.join(signals)}{memory}, last seen in")
        if failed := [rank for rank, report in alive.items() if report.failed]:
            return Cause(failed, "failed in", "; see the error above")
        if self.silent:
            words = "{is} gone" if self.timeout is None else "{does} not answer"
            return Cause(sorted(self.silent), f"{words}, last seen in")
        places = {rank: each.places[self.activity] for rank, each in alive.items() if self.activity in each.places}
        late = [rank for rank, place in places.items() if not (place.waits or alive[rank].lost)]
        if not 0 < len(late) < len(places):
            least = min((place.count for place in places.values()), default=0)
            late = [rank for rank, place in places.items() if place.count == least]
        if len(late) == len(places):
            return None
        return Cause(late, "{stays} in", "; raise train.timeout if that only takes long")

    def sentence(self, way_out: str) -> str:
        """Who, where, where the others are, and way_out."""
        longer = f" for {self.timeout:g} s (train.timeout)" if self.timeout is not None else ""
        cause = self.cause()
        if cause is None:
            return f"all wait for one another{longer}, {self._where(self.reports, 'in')}; {way_out}"
        others = [rank for rank in self.reports if rank not in cause.ranks]
        waited = f"; {self._where(others, 'waited in')}{longer}" if others else ""
        return f"{self._where(cause.ranks, cause.words)}{waited}{cause.hint}; {way_out}"

    def _where(self, ranks: Iterable[int], words: str) -> str:
        """Such as "ranks 0-3 on node1 waited in step 12, gradients, and rank 4 on node2 waited in step 12, update"."""
        groups: dict[tuple[str, str], list[int]] = {}
        for rank in sorted(ranks):
            report = self.reports.get(rank)
            place = report.places.get(self.activity) if report else None
            groups.setdefault((f" on {report.host}" if report else "", place.text if place else "start-up"), []).append(
                rank
            )
        parts = (
            f"{named(own)}{host} {words.format_map(ONE if len(own) == 1 else SEVERAL)} {place}"
            for (host, place), own in groups.items()
        )
        return ", and ".join(parts)


def named(ranks: list[int]) -> str:
    """Such as "ranks 0-3, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"

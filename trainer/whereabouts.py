"""Where a process of a run is, in words that the others can read once it does not answer any more."""

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

import parallel

# A thread whose innermost Python frame is in one of these waits for other processes: what they compute is elsewhere.
WAITS_IN = (str(Path(dist.__file__).parent), str(Path(parallel.__file__).parent))
TRAINING, SAVING = "training", "saving"


@dataclasses.dataclass(frozen=True)
class Place:
    """text: such as "step 12, gradients". count: how many places its thread was at before. since: when it came there,
    in seconds by its own clock; in a report, how long ago that was. waits: whether it is in a collective."""

    text: str
    count: int = 0
    since: float = 0.0
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What a process publishes of itself. beat: one more each time. places: by activity. lost: whether it has lost
    others or waited for them too long. failed: whether it ends by an error of its own."""

    host: str
    beat: int
    places: dict[str, Place]
    lost: bool = False
    failed: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_json(cls, text: str | bytes) -> "Report":
        data = json.loads(text)
        places = {activity: Place(**place) for activity, place in data["places"].items()}
        return cls(**{**data, "places": places})


class Whereabouts:
    """Kept up to date by the code that runs, which costs an assignment, and read by a `trainer.watch.Watch`.

    way_out: what a person can do once the run has ended where it is.
    """

    def __init__(self, text: str = "start-up") -> None:
        self.way_out = "the same command again starts anew"
        self._places = {TRAINING: (Place(text, since=time.monotonic()), threading.get_ident())}

    def at(self, text: str, activity: str = TRAINING) -> None:
        """The calling thread, which does all of this activity, is now at `text`."""
        count = self._places[activity][0].count + 1 if activity in self._places else 0
        self._places[activity] = (Place(text, count, time.monotonic()), threading.get_ident())

    def saved(self, step: int) -> None:
        """There is a whole checkpoint of this step, the newest."""
        self.way_out = f"the same command again resumes after step {step}"

    def places(self) -> dict[str, Place]:
        """As a report has them, by activity."""
        found, now = {}, time.monotonic()
        for activity, (place, thread) in tuple(self._places.items()):
            frame = sys._current_frames().get(thread)
            waits = frame is not None and frame.f_code.co_filename.startswith(WAITS_IN)
            found[activity] = dataclasses.replace(place, since=now - place.since, waits=waits)
        return found

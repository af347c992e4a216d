"""A refusal that all processes of a run share is said once, by rank 0."""

import os
import time

from trainer.gathering import connect

# Seconds that rank 0 gets to say the same: as long as it may not have started, and once it has.
BEFORE, AFTER = 30.0, 3.0


def said_by_main(text: str) -> bool:
    """Whether rank 0 refuses with the same sentence, so that this process need not say it.

    Processes that were started without torchrun or `weft launch` have no store while rank 0 is not there, and each says
    it.
    """
    if "RANK" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        store = connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), AFTER)
        if os.environ["RANK"] == "0":
            store.set("refusal", text)
            return False
        began = time.monotonic()
        while not store.check(["refusal"]):
            if time.monotonic() - began > (AFTER if store.check(["here/0"]) else BEFORE):
                return False
            time.sleep(0.05)
        return store.get("refusal").decode() == text
    except RuntimeError:
        return False

"""`python -m trainer.train CONFIG [key=value ...]`, alone or under torchrun: train, or resume, the run of a config."""

import argparse
import os
import sys
from collections.abc import Sequence

from configs.errors import sentence
from trainer.signals import Stop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description="Train, or resume, a run.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as train.steps=100")
    parser.add_argument("--stop-after", type=int, help="save and end after this step")
    parser.add_argument("--fresh", action="store_true", help="move aside what the run's folder holds, and start anew")
    args = parser.parse_intermixed_args(arguments)
    with Stop() as stop:
        return run(args, stop)


def run(args: argparse.Namespace, stop: Stop) -> int:
    # Imported only now, because it takes seconds, in which a signal must not be missed.
    from trainer.loop import Launch, train
    from trainer.preflight import load_run, refuse_data, refuse_machine
    from trainer.process import joined
    from trainer.refusals import said_by_main
    from trainer.whereabouts import Whereabouts

    try:
        config = load_run(args.config, args.overrides)
        refuse_machine(config)
        refuse_data(config)
        where = Whereabouts()
        with joined(config.mesh, config.train.timeout, where) as mesh:
            train(config, mesh, Launch(args.stop_after, args.fresh), stop=stop, where=where)
    except (ValueError, OSError, FloatingPointError) as error:
        rank, text = os.environ.get("RANK", "0"), sentence(error)
        if not said_by_main(text):
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

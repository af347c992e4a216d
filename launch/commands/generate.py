"""`weft generate`: text from a checkpoint or an exported folder.

Given a pipeline it starts the processes itself, as `weft eval` does.
"""

import argparse
import contextlib
import json
import os

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="MODEL", help="folder of a run, a checkpoint or a Hugging Face export; or a run's config"
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue")
    parser.add_argument(
        "--prompts", metavar="FILE", dest="file", help='one in each line; or JSON lines, {"prompt": "..."}'
    )
    parser.add_argument("--prompt-key", default="prompt", help="where JSON lines have the prompt (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="prompts at once (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's")
    parser.add_argument("--mesh", help="a pipeline that holds the model, such as pp=2 (default: one process)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in an export that is not Weft's")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")


def run(args: argparse.Namespace) -> int:
    from launch.runs import run_folder
    from parallel.mesh import MeshConfig
    from trainer.generate import check_sampling
    from trainer.process import joined
    from trainer.whereabouts import Whereabouts
    from trainer.writer import prompts_of, refuse_writing, writer

    # Before the weights are read, which takes time.
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    prompts = [*args.prompts, *(prompts_of(args.file, args.prompt_key) if args.file else [])]
    if not prompts:
        raise ValueError("no prompt is given; write one behind the model, or give a file with --prompts")
    folder, mesh = run_folder(args.run), MeshConfig.parse(args.mesh or "")
    if mesh.world_size > 1 and "WORLD_SIZE" not in os.environ:
        from launch import agent
        from launch.group import Group

        # Here, since the processes would each report it.
        refuse_writing(folder, mesh)
        return agent.work(Group(nproc=mesh.world_size), ["-m", "launch.cli", "generate", *words(args)])
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(joined(mesh, where=Whereabouts("generation"))) if mesh.world_size > 1 else None
        write = writer(folder, args.tokenizer, args.trust_remote_code, group)
        for start in range(0, len(prompts), args.batch):
            some = prompts[start : start + args.batch]
            settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "first": start}
            texts = write(some, args.max_new_tokens, **settings)
            if group is None or group.is_main:
                for prompt, text in zip(some, texts, strict=True):
                    line = json.dumps({"prompt": prompt, "text": text}) if args.json else prompt + text
                    print(line, flush=True)
    return 0


def words(args: argparse.Namespace) -> list[str]:
    """What the processes of a mesh are given."""
    names = ("mesh", "prompt_key", "max_new_tokens", "temperature", "top_p", "seed", "batch", "tokenizer")
    given = {name: getattr(args, name) for name in names} | {"prompts": args.file}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    # Behind "--", since a prompt may begin with a dash.
    return [args.run, *options, *(["--json"] if args.json else []), "--", *args.prompts]


COMMAND = Command("continue texts with a model", add_arguments, run)

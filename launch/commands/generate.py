"""`weft generate`: text from a checkpoint or an exported folder."""

import argparse
import json

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
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in an export that is not Weft's")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")


def run(args: argparse.Namespace) -> int:
    from launch.runs import run_folder
    from trainer.generate import check_sampling
    from trainer.writer import prompts_of, writer

    # Before the weights are read, which takes time.
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1")
    prompts = [*args.prompts, *(prompts_of(args.file, args.prompt_key) if args.file else [])]
    if not prompts:
        raise ValueError("no prompt is given; write one behind the model, or give a file with --prompts")
    write = writer(run_folder(args.run), args.tokenizer, args.trust_remote_code)
    for start in range(0, len(prompts), args.batch):
        some = prompts[start : start + args.batch]
        settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "first": start}
        for prompt, text in zip(some, write(some, args.max_new_tokens, **settings), strict=True):
            print(json.dumps({"prompt": prompt, "text": text}) if args.json else prompt + text, flush=True)
    return 0


COMMAND = Command("continue texts with a model", add_arguments, run)

"""`weft generate`: text from a run's newest checkpoint."""

import argparse

from launch.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint, or a run's config")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this share")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    import torch

    from launch.runs import newest_checkpoint, run_folder
    from models.lm import LM
    from trainer.data.tokenizer import Tokenizer
    from trainer.generate import check_sampling, generate

    # Before the weights are read, which takes time.
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    config, content, _ = newest_checkpoint(run_folder(args.run))
    if config.data.tokenizer is None:
        raise ValueError(
            f"the run {args.run} names no data.tokenizer, so its tokens cannot become text; train one that does"
        )
    tokenizer = Tokenizer.load(config.data.tokenizer)
    with torch.device("meta"):
        model = LM(config.model)
    model.load_state_dict(dict(content.model), assign=True)
    # As in training, where a document opens with the token that ended the one before.
    prompts = [[tokenizer.end_of_document, *tokenizer.encode(text)] for text in args.prompts]
    new = generate(
        model,
        prompts,
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=tokenizer.end_of_document,
    )
    for text, tokens in zip(args.prompts, new, strict=True):
        # Ids between the tokenizer's vocabulary and the model's stand for no text.
        print(text + tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size]))
    return 0


COMMAND = Command("continue a text with a run's newest checkpoint", add_arguments, run)

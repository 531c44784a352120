"""Measures how well the latent embedder's codes predict the class: top-1 accuracy of a linear classifier on them.

    diffusers-dod probe --model outputs/mine --train_data_dir digits/train --test_data_dir digits/test

Besides the codes, the command probes the raw latents that the embedder reads, and the codes of an embedder of the same
shape that was never trained.
Every probe is a multinomial logistic regression on standardised features; its weight decay is chosen on a fifth of the
training images. Without `--test_data_dir` a fifth of the images, the same for the same seed, is kept for the test.
"""

import argparse
import json
import sys

from ..cli import Parser, number, run


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod probe", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub repository")
    add(
        "--train_data_dir",
        required=True,
        help="folder with one subfolder per class, or one that `datasets.save_to_disk` wrote",
    )
    add("--test_data_dir", help="the same for the test; default: a fifth of the training images")
    add("--max_images", type=number(int, 1), help="images to use per set; default: all")
    add("--batch_size", type=number(int, 1), default=64, help="images per forward")
    add("--num_workers", type=number(int, 0), default=0, help="processes that read images")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the split and of the untrained embedder")
    add("--output", help="JSON file to write; the result is printed in any case")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def report(args: argparse.Namespace) -> None:
    from ..files import check_writable, write_json
    from .probing import probe

    if args.output:
        check_writable(args.output)
    record = probe(args)
    print(json.dumps(record, indent=2))
    if args.output:
        write_json(args.output, record)


def main(argv: list[str] | None = None) -> int:
    return run(lambda arguments: report(parse_args(arguments)), "diffusers-dod probe", argv)


if __name__ == "__main__":
    sys.exit(main())

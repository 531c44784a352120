"""Checks a saved pipeline, or pushes it to the Hub in one commit.

    diffusers-dod hub check outputs/mine --license apache-2.0
    diffusers-dod hub push outputs/mine user/my-model --license apache-2.0 --private

`check` lists what is missing or wrong and uploads nothing; its exit status is 1 if there are problems. A push that was
cut off leaves the repository as it was; the next one uploads only the large files that did not arrive.
"""

import argparse
import sys

from ..cli import BadInput, Parser, run


CHECK = """Lists what is missing or wrong in a saved pipeline or a LoRA, and uploads nothing.

The exit status is 1 if there are problems.
"""
PUSH = """Checks a saved pipeline or a LoRA, then uploads it to the Hub in one commit.

A `README.md` in the folder is uploaded unchanged as the model card; `--license`, `--dataset` and `--base_model` only
fill in a new card, which is written if there is none.

A push that was cut off leaves the repository as it was; the next one uploads only the large files that did not arrive.
"""


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="list what is missing or wrong, upload nothing", description=CHECK)
    push = commands.add_parser("push", help="check, then upload in one commit", description=PUSH)
    for command in (check, push):
        command.add_argument("folder", help="what `save_pretrained`, `train` or `save_lora_weights` wrote")
        text = "Hub licence identifier for a new card, such as apache-2.0; unused if the folder has a README.md"
        command.add_argument("--license", help=text)
    add = push.add_argument
    add("repo_id", help="user/name")
    add("--dataset", action="append", dest="datasets", help="Hub dataset used for training; may be repeated")
    add("--base_model", help="repository that it was converted or adapted from")
    add("--private", action="store_true", default=None, help="make a new repository private")
    add("--revision", help="branch, created if missing; default: main")
    add("--create_pr", action="store_true", help="open a pull request")
    add("--variant", choices=("fp16", "bf16"), help="upload half-precision weights as well")
    add(
        "--no-code",
        action="store_false",
        dest="include_code",
        help="do not upload the code that diffusers alone needs",
    )
    add("--dry_run", action="store_true", help="print what would be uploaded")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def check_or_push(argv: list[str]) -> int:
    arguments = vars(parse_args(argv))
    if arguments.pop("command") == "check":
        from .check import check_folder

        problems = check_folder(**arguments)
        print("\n".join(problems) if problems else f"{arguments['folder']} can be pushed.")
        return int(bool(problems))
    from .push import push_folder

    try:
        address = push_folder(**arguments)  # a PushFailed is an OSError, which `run` prints
    except ValueError as error:
        raise BadInput(*str(error).split("\n  ")) from error  # each problem of the folder
    if address is not None:
        print(address)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(check_or_push, "diffusers-dod hub", argv)


if __name__ == "__main__":
    sys.exit(main())

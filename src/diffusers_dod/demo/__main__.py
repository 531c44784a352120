"""Serves a web page that draws samples, lets you edit their codes, and shows the Python that reproduces them.

    diffusers-dod demo --model outputs/mine

Gradio's environment variables, such as GRADIO_SERVER_PORT, set the address. Needs gradio: `pip install "gradio>=6.0"`.
"""

import os
import sys

from ..cli import BadInput, Parser, bad_input, run


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod demo", description=__doc__)
    parser.add_argument(
        "--model",
        default=os.environ.get("DOD_MODEL"),
        help="folder or Hub repository; default: the environment variable DOD_MODEL, which a Space sets",
    )
    return parser


def show(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.model is None:
        raise BadInput("no model: pass --model, or set DOD_MODEL to a folder or Hub repository")
    try:
        from .page import serve
    except ImportError as error:
        raise BadInput(f'the demo needs gradio ({error}): `pip install "gradio>=6.0"`') from error
    with bad_input():
        serve(args.model)


def main(argv: list[str] | None = None) -> int:
    return run(show, "diffusers-dod demo", argv)


if __name__ == "__main__":
    sys.exit(main())

"""All commands of diffusers-dod: `diffusers-dod COMMAND`, or `python -m diffusers_dod COMMAND`."""

import importlib
import sys

from . import __version__
from .cli import BadInput, Parser, run


# Each module's `main` takes the arguments that follow the command and returns the exit status.
COMMANDS = {
    "train": ("training.__main__", "train a model on images or on cached latents"),
    "train-codes": ("training.train_codes", "train a code model, which replaces a pipeline's stage 1"),
    "cache": ("data.__main__", "encode a data set to latents once, for training"),
    "sample": ("evaluation.sample", "draw many images for an evaluation"),
    "evaluate": ("evaluation.__main__", "compare samples with a reference: FID, KID, precision and recall, ..."),
    "probe": ("evaluation.probe", "measure how much of the class the codes hold"),
    "convert": ("conversion.__main__", "make a DoD pipeline from a LightningDiT, JiT, SiT, DiT or FiTv2 checkpoint"),
    "hub": ("hub.__main__", "check a saved pipeline, or push it to the Hub"),
    "viz": ("viz.__main__", "draw stages, differences, codes and training curves"),
    "demo": ("demo.__main__", "serve a web page that draws samples and edits their codes"),
}


def parse(argv: list[str]) -> tuple[str, list[str]]:
    lines = [f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()]
    parser = Parser(
        prog="diffusers-dod",
        usage="diffusers-dod [-h] [--version] COMMAND ...",
        description="Diffusion on Diffusion for diffusers.\n\ncommands:\n" + "\n".join(lines),
        epilog="`diffusers-dod COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"diffusers-dod {__version__}")
    parser.parse_args(argv[:1] if argv[:1] and argv[0].startswith("-") else [])
    if not argv or argv[0] not in COMMANDS:
        raise BadInput(f"choose one of {', '.join(COMMANDS)}" + (f", not {argv[0]!r}" if argv else ""))
    return argv[0], argv[1:]


def dispatch(argv: list[str]) -> int:
    command, arguments = parse(argv)
    return importlib.import_module(f"{__package__}.{COMMANDS[command][0]}").main(arguments)


def main() -> int:
    return run(dispatch, "diffusers-dod")


if __name__ == "__main__":
    sys.exit(main())

"""The kit of all commands: their parser, bad input as one line, and how they end."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# What they raise is about a connection, a server's answer, or a file.
OUTSIDE_LIBRARIES = ("safetensors", "httpcore", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3")


class CommandError(Exception):
    """What the user must know: printed as one line without a traceback, and the exit status.

    Where several processes run one command, the first of them prints what all of them met.

    Args:
        message (`str`): the line.
        details (`str`): further lines, indented, such as each of several problems.
    """

    status = 1
    met_by_all = True

    def __init__(self, message: str, *details: str):
        super().__init__(message)
        self.details = details


class BadInput(CommandError):
    """Something that the user must change."""

    status = 2


class BadData(BadInput):
    """The same, met by a single process."""

    met_by_all = False


class WorkerLost(CommandError):
    """A worker of a dataloader was killed."""

    met_by_all = False


@contextmanager
def bad_input(*errors: type[Exception], what: str = "") -> Iterator[None]:
    """Turns `errors` (`ValueError` and `OSError` by default) into [`BadInput`] with the first line of their message.

    Args:
        errors (exception classes): what a library raises for what the user gave.
        what (`str`): put in front of the message, such as the option that it is about.
    """
    try:
        yield
    except CommandError:
        raise
    except errors or (ValueError, OSError) as error:  # noqa: B030 - a tuple either way
        raise BadInput(f"{what}{': ' if what else ''}{first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and names every default that the help of an option does not name itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        is_off = default is None or default is False or default == [] or isinstance(action, argparse._StoreFalseAction)
        if is_off or "default:" in text:
            return text
        if isinstance(default, list):
            return f"{text} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action) or ""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are [`BadInput`]; `-` and `_` within the name of an option are the same."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"formatter_class": _HelpFormatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> Any:
        raise BadInput(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        spellings = {option.replace("-", "_"): option for option in self._option_string_actions}

        def spell(argument: str) -> str:
            if not argument.isascii() and argument.encode(errors="ignore").decode() != argument:
                self.error(f"{argument!a} is not UTF-8: rename it")  # configurations and reports are
            name, equals, value = argument.partition("=")
            return spellings.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else argument

        return super().parse_known_args([spell(text) for text in (sys.argv[1:] if args is None else args)], namespace)


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """The `type` of an option that takes finite numbers from `low` to `high`, integers up to 2**31 - 1 by default."""
    if kind is int and high == float("inf"):
        high = 2**31 - 1  # the largest that every library takes

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or value in (float("inf"), float("-inf")):
            wanted = f"from {low} to {high}"
            if high == float("inf"):
                wanted = "a finite number" + ("" if low == -high else f" of at least {low}")
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name the type
    return parse


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a file or in `text` itself, without the entries that diffusers adds to a saved config."""
    try:
        values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
        return {name: value for name, value in values.items() if not name.startswith("_")}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a JSON object nor a file with one ({error})") from error


def run(main: Callable[[list[str]], int | None], prog: str, argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, that of a [`CommandError`], 2 for files and network, 1 for a
    lost worker.

    Args:
        main (`Callable`): takes the arguments; returns `None` or a status.
        prog (`str`): name of the command, for messages.
        argv (`list` of `str`, *optional*): its arguments, those of the process by default.
    """
    details: tuple[str, ...] = ()
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except CommandError as error:
        if error.met_by_all and os.environ.get("RANK", "0") != "0":
            return error.status
        message, status, details = str(error), error.status, error.details
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        is_worker = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")  # killed, usually
        is_outside = type(error).__module__.partition(".")[0] in OUTSIDE_LIBRARIES
        if not is_worker and not is_outside and not isinstance(error, OSError):
            raise
        message, status = first_line(error), WorkerLost.status if is_worker else BadInput.status
    for start, line in ((f"{prog}: error: ", message), *(("  ", detail) for detail in details)):
        print(f"{start}{' '.join(line.split())}", file=sys.stderr)  # one line, whatever the names in it are
    return status

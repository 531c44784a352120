"""Runs Python commands in processes forked from this one, which has imported the libraries and run nothing yet.

Starting Python and importing diffusers takes longer than most of a documentation's commands. `server.py FOLDER` listens
on `FOLDER/socket`; a program in `FOLDER/bin` (`command.py` under the name of what it stands for) hands over its
arguments, folder, environment and standard streams, and ends with the command's status.

`FOLDER/cuts.json` holds pairs of lists of words: a command that has all of the first gets the second appended.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import diffusers


# Each imports much of what commands need.
IMPORTED = "accelerate.commands.accelerate_cli torch.distributed.run torchmetrics.image torch.utils.tensorboard"
IMPORTED += " diffusers_dod.training.loop diffusers_dod.data.caching diffusers_dod.evaluation.sampling"
IMPORTED += " diffusers_dod.evaluation.probing diffusers_dod.evaluation.extractors diffusers_dod.conversion.converting"
IMPORTED += " diffusers_dod.hub.push diffusers_dod.viz.grids diffusers_dod.viz.codes"
LAZILY_IMPORTED = ("AutoencoderKL", "DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
MODULES = {
    "accelerate": "accelerate.commands.accelerate_cli",
    "torchrun": "torch.distributed.run",
    "diffusers-dod": "diffusers_dod",
}


def import_libraries():
    """What the commands import."""
    for name in IMPORTED.split():
        importlib.import_module(name)
    for name in LAZILY_IMPORTED:
        getattr(diffusers, name)


def run(folder: Path, request: dict) -> None:
    """What `python` would do with these arguments, in a process of its own."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    program, *arguments = request["arguments"]
    sys.executable = str(folder / "bin" / "python")
    if program in MODULES:
        arguments = ["-m", MODULES[program], *arguments]
    while arguments[0] in ("-u", "-S"):
        arguments.pop(0)
    for words, more in json.loads((folder / "cuts.json").read_text()):
        if program in ("python", "diffusers-dod") and set(words) <= set(arguments):
            arguments += more
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def end(status: int) -> None:
    """Ends the process as the interpreter does, but for taking apart what was imported: that takes seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    folder = Path(sys.argv[1]).resolve()
    import_libraries()
    gc.freeze()  # or a collection in each command copies all the memory that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a command
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        command = os.fork()
        if command:
            status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
            connection.sendall(str(status if status >= 0 else 128 - status).encode())
            os._exit(0)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        try:
            run(folder, json.loads(message))
            end(0)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            end(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        except BaseException:
            traceback.print_exc()
            end(1)


if __name__ == "__main__":
    main()

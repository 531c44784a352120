"""Runs command lines of diffusers-dod, each in a process and a folder of its own, and tells how they ended.

    python tests/flag_runs.py cases.json results.jsonl

`cases.json` is a list of lists of words. A result, one a line, has the status, what came on stderr, and the seconds. The libraries are
imported once and every line is run in a fork, so that a line takes a fraction of a second; the Hub counts as offline.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
LONGEST = 300  # seconds; compiling takes a minute on a busy machine


def furnish(folder: Path) -> None:
    """What a wrong value may name."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("text\n")
    (folder / "bytes").write_bytes(b"\xff\xfe\x00{")
    (folder / "list.json").write_text("[1]")
    (folder / "loop").symlink_to("loop")


def run(words: list[str], folder: Path) -> dict:
    furnish(folder)
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
        from diffusers_dod.__main__ import main

        sys.argv = ["diffusers-dod", *words]
        status = 99
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = None
    while status is None:
        done, how = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(how)
        elif time.monotonic() - started > LONGEST:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = "hang"
        else:
            time.sleep(0.005)
    stderr = Path(folder, "stderr").read_text(errors="replace")
    return {"words": words, "status": status, "stderr": stderr, "seconds": time.monotonic() - started}


def main() -> None:
    import diffusers_dod.conversion.converting
    import diffusers_dod.data.caching
    import diffusers_dod.evaluation.extractors
    import diffusers_dod.evaluation.probing
    import diffusers_dod.evaluation.sampling
    import diffusers_dod.hub.push
    import diffusers_dod.training.codes
    import diffusers_dod.training.loop
    import diffusers_dod.viz  # noqa: F401

    cases, results = map(Path, sys.argv[1:])
    with results.open("w") as file:
        for words in json.loads(cases.read_text()):
            print(json.dumps(run(words, results.with_name("case"))), file=file, flush=True)


if __name__ == "__main__":
    main()

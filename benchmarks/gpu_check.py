"""Everything about a GPU in one command: `make gpu-check`, or `python benchmarks/gpu_check.py`. It needs no network.

Runs `tests/test_gpu.py` and the groups of `bench.py` that matter on a GPU, each part in a process of its own, and keeps what
is done in one JSON file: the same command resumes with what is missing or failed. No part starts after `--minutes`, for
machines that are lent by the piece. Prints rows for the table of `NOTES.md`.

`--tiny --device cpu` runs the same parts with next to nothing in them, and says which ones need a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
GROUPS = ("mfu", "sampling", "training", "graphs", "memory", "compile", "depth", "throughput", "solvers")
GPU_ONLY = ("mfu", "graphs", "throughput", "solvers", "tests")
# On two busy cores compiling takes longer than everything else of the tiny run.
NOT_TINY = ("compile", "depth", "memory")
TINY = ("--layers", "1", "--batch_size", "2", "--steps", "1", "--repeats", "1")
PARTS = (*GROUPS, "tests")


def run_group(name: str, args: argparse.Namespace, folder: str) -> dict:
    """A group of `bench.py`: its rows, seconds and load, and the machine."""
    output = Path(folder, "report.json")
    command = [
        sys.executable,
        ROOT / "benchmarks/bench.py",
        "--device",
        args.device,
        "--rows",
        name,
        "--output",
        output,
    ]
    subprocess.run(
        [*command, *(TINY if args.tiny else ("--repeats", "5"))], check=True, timeout=args.part_minutes * 60
    )
    report = json.loads(output.read_text())
    return {**report["groups"][name], "machine": report["machine"]}


def run_tests(_: str, args: argparse.Namespace, folder: str) -> dict:
    """How each test of `tests/test_gpu.py` ended."""
    output = Path(folder, "tests.xml")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", f"--junitxml={output}"]
    subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, timeout=args.part_minutes * 60)
    rows = {}
    for case in ElementTree.parse(output).iter("testcase"):
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        rows[case.get("name")] = f"{ends[0].tag}: {ends[0].get('message')}"[:200] if ends else "passed"
    failed = [name for name, end in rows.items() if end.startswith(("failure", "error"))]
    return {"rows": rows} | ({"failed": failed} if failed or not rows else {})


def run_part(name: str, args: argparse.Namespace) -> dict:
    if args.device == "cpu" and name in GPU_ONLY:
        return {"skipped": "needs a GPU"}
    if args.tiny and name in NOT_TINY:
        return {"skipped": "too long for the tiny run"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            part = (run_tests if name == "tests" else run_group)(name, args, folder)
        except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
            part = {"failed": type(error).__name__}  # what went wrong was printed
    return {**part, "seconds": time.perf_counter() - start}


def table(parts: dict) -> str:
    """Rows for `NOTES.md`: what was measured, its middle, and its quartiles where it has some."""
    lines = ["| part | figure | value | quartiles |", "|---|---|---|---|"]
    for name, part in parts.items():
        outcome = part.get("skipped") or (f"failed: {part['failed']}" if "failed" in part else None)
        if outcome is not None:
            lines.append(f"| {name} | | {outcome} | |")
        for row, value in part.get("rows", {}).items():
            if isinstance(value, dict):
                lines.append(f"| {name} | {row} | {value['ratio']:.3g} | {value['low']:.3g}-{value['high']:.3g} |")
            else:
                lines.append(f"| {name} | {row} | {value if isinstance(value, str) else format(value, '.4g')} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="seconds in the place of minutes, for CI")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part starts")
    parser.add_argument("--part_minutes", type=float, default=8.0, help="after which a part has failed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results-gpu.json"))
    args = parser.parse_args()
    parts = json.loads(args.output.read_text()) if args.output.exists() else {}
    start = time.perf_counter()
    for name in args.parts:
        if "rows" in parts.get(name, {}) and "failed" not in parts[name]:
            continue
        if time.perf_counter() - start >= 60 * args.minutes:
            print(f"{name} and what follows are left for the next call.")
            break
        parts[name] = run_part(name, args)
        args.output.write_text(json.dumps(parts, indent=2) + "\n")
    print(table(parts))
    return int(any("failed" in part for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

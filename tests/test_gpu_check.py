"""`benchmarks/gpu_check.py` without a GPU: it says what it lacks, keeps what is done, and goes on with the rest."""

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu_check.py"


def check(output, *options):
    command = [sys.executable, SCRIPT, "--tiny", "--device", "cpu", "--output", output, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(output.read_text()) if output.exists() else {}


def test_parts_are_done_once_and_those_of_a_gpu_are_skipped(tmp_path):
    output = tmp_path / "results.json"
    printed, parts = check(output, "--minutes", "0")
    assert "left for the next call" in printed and not parts
    gpu_only = ["mfu", "graphs", "throughput", "solvers", "tests"]
    printed, parts = check(output, "--parts", *gpu_only, "sampling")
    assert [parts[name]["skipped"] for name in gpu_only] == ["needs a GPU"] * 5
    assert all(f"| {name} | | needs a GPU | |" in printed for name in gpu_only)
    assert (
        parts["sampling"]["rows"] and "| sampling | pipeline, 2 stages of 1 guided steps / bare forwards |" in printed
    )
    assert str(tmp_path) not in output.read_text()
    seconds = parts["sampling"]["seconds"]
    assert check(output, "--parts", "mfu", "sampling")[1]["sampling"]["seconds"] == seconds

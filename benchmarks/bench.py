"""Speed against named rivals, every row a ratio measured in this run: `make bench`, or `python benchmarks/bench.py`.

On a CPU the models have DoD-B/2's full width and, but for the rows of full depth, `--layers` blocks; on a GPU they are
whole and run in bfloat16. `--rows` takes some groups only:

    training        a training step and a forward of DoD-B/2 against diffusers' DiTTransformer2DModel of the same width
                    and depth, which has the same multiply-accumulates on tokens
    depth           the embedder beside whole backbones: a training step, and its share of 30 guided steps
    sampling        a guided two-stage call of the pipeline against the same number of bare forwards of the same batch
    scaling         a training step of twice the batch, or of twice the tokens, against two
    ddp             two processes against one (CPU)
    memory          peak memory and time of a training step with gradient checkpointing against without
    compile         compiled blocks against eager ones, fused q/k/v projections against separate ones
    bfloat16        bfloat16 autocast against float32
    loop            a step of `diffusers-dod train` against its models' own work, models so small that the rest shows
    cached_loading  the wait for cached latents against the training step
    import          `DoDPipeline` imported after the classes of diffusers that it needs, against importing those
    loading         `DoDPipeline.from_pretrained` of a folder against reading the bytes of its weights
    graphs          small batches with CUDA graphs against eager (GPU)
    solvers         sampling with UniPC and with DPM-Solver++ against Euler's method (GPU)
    mfu, throughput utilisation and memory in training, images per second in sampling (GPU)

Prints a table and writes JSON, after each group, so that a run that is cut short keeps what it has.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import interleaved
import torch
from gpu_rows import graphs_rows, mfu_rows, solver_rows, throughput_rows
from interleaved import Ratio
from loop_rows import loop_rows
from model_rows import bfloat16_rows, compile_rows, depth_rows, scaling_rows, training_rows
from pipeline_rows import import_rows, loading_rows, sampling_rows
from process_rows import cached_loading_rows, ddp_rows, memory_rows


GROUPS = {
    "training": training_rows,
    "depth": depth_rows,
    "sampling": sampling_rows,
    "scaling": scaling_rows,
    "ddp": ddp_rows,
    "memory": memory_rows,
    "compile": compile_rows,
    "bfloat16": bfloat16_rows,
    "loop": loop_rows,
    "cached_loading": cached_loading_rows,
    "import": import_rows,
    "loading": loading_rows,
    "graphs": graphs_rows,
    "mfu": mfu_rows,
    "throughput": throughput_rows,
    "solvers": solver_rows,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--rows", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), metavar="GROUP")
    parser.add_argument("--layers", type=int, help="blocks of the models; 3 on a CPU and 15, all, on a GPU by default")
    parser.add_argument("--batch_size", type=int, help="4 on a CPU and 64 on a GPU by default")
    parser.add_argument("--steps", type=int, default=4, help="steps per stage")
    parser.add_argument("--repeats", type=int, default=7)
    cpu_time = "one thread, by the time that the CPU gave it: for a machine that other work takes; not ddp and memory"
    parser.add_argument("--cpu_time", action="store_true", help=cpu_time)
    parser.add_argument("--output", default="benchmarks/results.json")
    args = parser.parse_args()
    args.layers = args.layers or (3 if args.device == "cpu" else 15)
    args.batch_size = args.batch_size or (4 if args.device == "cpu" else 64)
    return args


def describe_machine(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
    }


def main() -> None:
    args = parse_args()
    if args.cpu_time:
        interleaved.clock = time.process_time
        torch.set_num_threads(1)
    report = {"setting": {**vars(args), "seed": 0}, "machine": describe_machine(args.device), "groups": {}}
    print("| ours / rival | ratio | quartiles | ours, ms | rival, ms |\n|---|---|---|---|---|")
    for group in args.rows:
        start, load = time.perf_counter(), os.getloadavg()[0]
        rows = GROUPS[group](args)
        for name, row in rows.items():
            if isinstance(row, Ratio):
                quartiles, times = f"{row.low:.3g}-{row.high:.3g}", (1e3 * row.ours, 1e3 * row.rival)
                print(f"| {name} | {row.ratio:.3g} | {quartiles} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)
            else:
                print(f"| {name} | {row:.4g} | | | |", flush=True)
        report["groups"][group] = {
            "rows": {name: row._asdict() if isinstance(row, Ratio) else row for name, row in rows.items()},
            "seconds": time.perf_counter() - start,
            "load_average": [load, os.getloadavg()[0]],  # of the minute before the group and of its last one
        }
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

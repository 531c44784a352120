"""Evidence on real data: DoD against a class-only model of the same backbone, by one command.

    python study/run_study.py digits --output_dir outputs/study
    python study/run_study.py emoji emoji-long --source node_modules

Data flows as: data set -> referee -> runs (train, save, sample, measure), each in its own process -> one JSON per run
-> tables and plots (`report.py`). The same command resumes after a stop: nothing that exists is repeated, and a new
setting is measured without training again.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from data_sets import DATA_SETS, DataSet
from experiments import CLASS_ONLY, DOD, MAIN, MARKS, NUM_SAMPLES, STUDIES, VARIANTS, settings
from measure_model import Setting, measure
from referee import Referee
from train_model import Size, build_models, train, training_step

from diffusers_dod import DoDPipeline


class Run(NamedTuple):
    """One variant of a study, trained with one seed: where its figures and models are."""

    folder: Path
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.variant}, seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / "runs" / f"{self.variant}-{self.seed}.json"

    @property
    def models(self) -> Path:
        return self.folder / "models" / f"{self.variant}-{self.seed}".replace(" ", "_")

    def record(self) -> dict | None:
        """What has been measured so far."""
        return json.loads(self.result.read_text()) if self.result.exists() else None


def step_time_ratio(data: DataSet, size: Size, repeats: int = 40) -> float:
    """Time per training step of DoD over a class-only model's: both by turns in this process, the median of all turns."""
    torch.manual_seed(0)
    models = {variant: build_models(data, variant, size) for variant in (CLASS_ONLY, DOD)}
    for pair in models.values():
        for model in pair:
            model.to(data.images.device).compile_repeated_blocks()
    ratios = []
    for _ in range(repeats + 5):
        seconds = {}
        for variant, pair in models.items():
            start = time.perf_counter()
            training_step(*pair, data, variant, size.batch_size).backward()
            seconds[variant] = seconds_since(start, data)
        ratios.append(seconds[DOD] / seconds[CLASS_ONLY])
    return statistics.median(ratios[5:])  # after warm-up


def seconds_since(start: float, data: DataSet) -> float:
    if data.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def write_json(path: Path, value) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def prepare(name: str, source: Path | None, folder: Path, size: Size, num_samples: int, device: str) -> None:
    """Writes the data, its referee and the ratio of step times, once."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "data.json").exists():
        return
    data = DATA_SETS[name](source)
    referee = Referee(data)
    torch.save(data._asdict(), folder / "data.pt")
    torch.save(referee.state(), folder / "referee.pt")
    held_out = torch.randperm(len(data.held_out_images), generator=torch.Generator().manual_seed(0))[:num_samples]
    parameters = [sum(p.numel() for p in model.parameters()) for model in build_models(data, DOD, size)]
    facts = {
        "images": len(data.images),
        "held_out": len(data.held_out_images),
        "classes": len(data.class_names),
        "referee_accuracy": referee.accuracy,
        "real": referee.measure(data.held_out_images[held_out], data.held_out_labels[held_out]),
        "step_time_ratio": step_time_ratio(on_device(data, device), size),
        "size": asdict(size),
        "parameters": {"transformer": parameters[0], "latent_embedder": parameters[1]},
        "num_samples": num_samples,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "torch": torch.__version__,
    }
    write_json(folder / "data.json", facts)


def on_device(data: DataSet, device: str) -> DataSet:
    return DataSet(*(value.to(device) if torch.is_tensor(value) else value for value in data))


def missing_settings(record: dict, more_guidance: bool) -> dict[int, list[Setting]]:
    """The settings that a run has not been sampled with yet, by step."""
    measured = {(row["step"], row["setting"]) for row in record["rows"]}
    steps = record["steps"]
    wanted = {step: settings(record["variant"], step, steps, more_guidance) for step in steps}
    missing = {step: [s for s in of if (step, str(s)) not in measured] for step, of in wanted.items()}
    return {step: of for step, of in missing.items() if of}


def load_pipeline(folder: Path, device: str) -> DoDPipeline:
    pipe = DoDPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(dynamic=False)
    return pipe


def execute(run: Run, steps: list[int], size: Size, num_samples: int, device: str, more_guidance: bool) -> None:
    """Trains one model, measures it at each of `steps` and writes its result; an existing model is only measured."""
    torch.set_num_threads(1)
    # Both files are this study's own; tensors only are read.
    data = on_device(DataSet(**torch.load(run.folder / "data.pt", weights_only=True)), device)
    referee = Referee.load(torch.load(run.folder / "referee.pt", weights_only=True), data)
    record = run.record()
    if record is None:
        start = time.monotonic()
        train(data, VARIANTS[run.variant], size, steps, run.seed, run.models)
        seconds = round(time.monotonic() - start)
        record = {"variant": run.variant, "seed": run.seed, "steps": steps, "training_seconds": seconds, "rows": []}
    for step, missing in missing_settings(record, more_guidance).items():
        pipe, weak = (load_pipeline(run.models / f"step-{number}", device) for number in (step, record["steps"][0]))
        for row in measure(pipe, weak, missing, num_samples, data, referee, run.seed):
            record["rows"].append({"step": step, **row})
        write_json(run.result, record)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", choices=STUDIES)
    parser.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(MAIN))
    parser.add_argument("--more_guidance", action="store_true", help="other kinds of guidance too, of the main models")
    parser.add_argument("--steps", type=int, help="per run (default: the study's own)")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--width", type=int, default=Size.width, help="of the backbone, in heads of 32")
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--batch_size", type=int, default=Size.batch_size)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one CPU thread each")
    args = parser.parse_args()
    size = Size(args.width, args.width // 32, args.layers, args.batch_size)

    jobs: dict[Run, list[int]] = {}
    for name in args.study:
        folder = args.output_dir / name
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        prepare(STUDIES[name].data, args.source, folder, size, args.num_samples, args.device)
        ratio = json.loads((folder / "data.json").read_text())["step_time_ratio"]
        for run in (Run(folder, variant, seed) for seed in args.seeds for variant in args.variants):
            record = run.record()
            if record is not None and not missing_settings(record, args.more_guidance):
                continue
            total = args.steps or STUDIES[name].steps
            jobs[run] = [round(total * mark) for mark in MARKS]
            if run.variant == "class_only":
                jobs[run].append(round(total * max(ratio, 1.05)))

    # The blocks compile in every process; spawned ones share nothing but the compiler's cache.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(execute, run, steps, size, args.num_samples, args.device, args.more_guidance): run
            for run, steps in jobs.items()
        }
        start = time.monotonic()
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            minutes = (time.monotonic() - start) / 60
            print(f"{futures[future]}: {number} of {len(jobs)} after {minutes:.0f} min", flush=True)


if __name__ == "__main__":
    main()

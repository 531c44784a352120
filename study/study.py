"""Evidence on real data: DoD against a class-only model of the same backbone, by one command.

    python examples/study/study.py digits --output_dir outputs/study
    python examples/study/study.py emoji emoji-long --source node_modules

Data flows as: data set -> referee -> runs (train, save, sample, measure), each in a process of its own -> one JSON a run
-> tables and plots (`report.py`). What is there already is not repeated, so the same command goes on after a stop, and a
setting that was added is measured without training again.
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

import torch
from data_sets import DATA_SETS, DataSet
from experiments import CLASS_ONLY, DOD, DOD_REDRAWN, MAIN, MARKS, NUM_SAMPLES, STUDIES, VARIANTS, settings
from measure_model import Setting, measure
from referee import Referee
from train_model import (
    REDRAW_AT,
    REDRAW_BATCH,
    REDRAWN_PER_STEP,
    Size,
    build_models,
    redraw,
    train,
    training_step,
)

from diffusers_dod import DoDPipeline


def step_time_ratios(data: DataSet, size: Size, repeats: int = 40) -> dict[str, float]:
    """The time of a step of DoD, plain and with redrawn priors, over a class-only one's.

    All by turns in this process, the median of all turns. A step with redrawn priors has its share of the redrawing.
    """
    torch.manual_seed(0)
    variants = {"class-only": CLASS_ONLY, "DoD": DOD, "redrawn priors": DOD_REDRAWN}
    models = {name: build_models(data, variant, size) for name, variant in variants.items()}
    for pair in models.values():
        for model in pair:
            model.to(data.images.device).compile_repeated_blocks()
    rows = torch.randperm(len(data.images), device=data.images.device)[:REDRAW_BATCH]
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 5):
        seconds = {}
        start = time.perf_counter()
        redrawn = redraw(models["redrawn priors"][0], data, rows, DOD_REDRAWN.redraw_sigmas)
        redrawing = seconds_since(start, data) / REDRAW_BATCH * len(REDRAW_AT) * REDRAWN_PER_STEP
        for name, variant in variants.items():
            start = time.perf_counter()
            of_variant = redrawn if variant.redrawn_prior else None
            training_step(*models[name], data, variant, size.batch_size, redrawn=of_variant).backward()
            seconds[name] = seconds_since(start, data)
        seconds["redrawn priors"] += redrawing
        if turn >= 5:
            for name in variants:
                ratios[name].append(seconds[name] / seconds["class-only"])
    return {name: statistics.median(values) for name, values in ratios.items()}


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
    ratios = step_time_ratios(on_device(data, device), size)
    facts = {
        "images": len(data.images),
        "held_out": len(data.held_out_images),
        "classes": len(data.class_names),
        "referee_accuracy": referee.accuracy,
        "real": referee.measure(data.held_out_images[held_out], data.held_out_labels[held_out]),
        "step_time_ratio": ratios["DoD"],
        "redrawn_time_ratio": ratios["redrawn priors"],
        "size": asdict(size),
        "parameters": {"transformer": parameters[0], "latent_embedder": parameters[1]},
        "num_samples": num_samples,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "torch": torch.__version__,
    }
    write_json(folder / "data.json", facts)


def on_device(data: DataSet, device: str) -> DataSet:
    return DataSet(*(value.to(device) if torch.is_tensor(value) else value for value in data))


def missing_settings(name: str, record: dict, more_guidance: bool) -> dict[int, list[Setting]]:
    """By step, what a run has not been sampled with yet; another setting needs no other training."""
    measured = {(row["step"], row["setting"]) for row in record["rows"]}
    wanted = {step: settings(name, step, record["steps"], more_guidance) for step in record["steps"]}
    missing = {step: [s for s in of if (step, str(s)) not in measured] for step, of in wanted.items()}
    return {step: of for step, of in missing.items() if of}


def load_pipeline(folder: Path, device: str) -> DoDPipeline:
    pipe = DoDPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(dynamic=False)
    return pipe


def run(
    folder: Path,
    name: str,
    seed: int,
    steps: list[int],
    size: Size,
    num_samples: int,
    device: str,
    more_guidance: bool,
) -> None:
    """Trains one model, measures it at every mark and writes `runs/name-seed.json`."""
    torch.set_num_threads(1)
    variant = VARIANTS[name]
    # Both files are this study's own; tensors only are read.
    data = on_device(DataSet(**torch.load(folder / "data.pt", weights_only=True)), device)
    referee = Referee.load(torch.load(folder / "referee.pt", weights_only=True), data)
    result = folder / "runs" / f"{name}-{seed}.json"
    models = folder / "models" / f"{name}-{seed}".replace(" ", "_")
    if result.exists():
        record = json.loads(result.read_text())
    else:
        start = time.monotonic()
        train(data, variant, size, steps, seed, models)
        seconds = round(time.monotonic() - start)
        record = {"variant": name, "seed": seed, "steps": steps, "training_seconds": seconds, "rows": []}
    for step, missing in missing_settings(name, record, more_guidance).items():
        pipe, weak = (load_pipeline(models / f"step-{number}", device) for number in (step, record["steps"][0]))
        for row in measure(pipe, weak, missing, num_samples, data, referee, seed):
            record["rows"].append({"step": step, **row})
        write_json(result, record)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", choices=STUDIES)
    parser.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(MAIN))
    parser.add_argument("--more_guidance", action="store_true", help="other kinds of guidance too, of the main models")
    parser.add_argument("--steps", type=int, help="of a run; the study's own if not given")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--width", type=int, default=Size.width, help="of the backbone, in heads of 32")
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--batch_size", type=int, default=Size.batch_size)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one CPU thread each")
    args = parser.parse_args()
    size = Size(args.width, args.width // 32, args.layers, args.batch_size)

    jobs = []
    for name in args.study:
        folder = args.output_dir / name
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        prepare(STUDIES[name].data, args.source, folder, size, args.num_samples, args.device)
        ratio = json.loads((folder / "data.json").read_text())["step_time_ratio"]
        for seed in args.seeds:
            for variant in args.variants:
                result = folder / "runs" / f"{variant}-{seed}.json"
                record = json.loads(result.read_text()) if result.exists() else None
                if record is not None and not missing_settings(variant, record, args.more_guidance):
                    continue
                total = args.steps or STUDIES[name].steps
                steps = [round(total * mark) for mark in MARKS]
                if variant == "class_only":
                    steps.append(round(total * max(ratio, 1.05)))
                jobs.append((folder, variant, seed, steps, size, args.num_samples, args.device, args.more_guidance))

    # The blocks compile in every process; spawned ones share nothing but the compiler's cache.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *job): f"{job[0].name}: {job[1]}, seed {job[2]}" for job in jobs}
        start = time.monotonic()
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            minutes = (time.monotonic() - start) / 60
            print(f"{futures[future]}: {number} of {len(jobs)} after {minutes:.0f} min", flush=True)


if __name__ == "__main__":
    main()

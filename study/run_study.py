"""Evidence on real data: class-only models, DoD, and DoD with a model of the codes, at equal training time.

    python study/run_study.py digits                                    # under an hour on two CPU cores
    python study/run_study.py letters --device cuda
    python study/run_study.py emoji --source node_modules --device cuda

Data flows as: data set -> referee, times per step -> trainings of all variants and seeds -> code models -> samples of every
setting -> figures -> one JSON per run in `--output_dir` -> tables and plots (`report.py`). A run is not repeated if its
JSON exists.
"""

import argparse
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from data_sets import DATA_SETS, DataSet
from experiments import MAIN, NUM_SAMPLES, STUDIES, VARIANTS, Setting, Size, Study, settings
from models import begin_code_training, begin_training, build_pipeline, copying, draw, sample_labels
from referee import Referee
from training import Training, train_together

from diffusers_dod import DoDPipeline


def load_data(name: str, source: Path | None, folder: Path) -> DataSet:
    """The data set, kept in one file once it was made."""
    file = folder / "data.npz"
    if not file.exists():
        data = DATA_SETS[name](source)
        to_bytes = {
            key: ((value + 1) * 127.5).round().byte().numpy()
            for key, value in data._asdict().items()
            if "images" in key
        }
        numbers = {key: value.numpy() for key, value in data._asdict().items() if key.endswith(("labels", "groups"))}
        np.savez_compressed(file, class_names=np.array(data.class_names), **to_bytes, **numbers)
    with np.load(file, allow_pickle=False) as arrays:
        values = {
            key: torch.from_numpy(arrays[key]) if key != "class_names" else arrays[key].tolist()
            for key in DataSet._fields
        }
    return DataSet(**{key: value.float() / 127.5 - 1 if "images" in key else value for key, value in values.items()})


def cpu_seconds(training: Training, repeats: int) -> float:
    """CPU time per step of one thread, the median of steps after some warm-up."""
    times = []
    for _ in range(repeats + 3):
        start = time.process_time()
        training.step()
        times.append(time.process_time() - start)
    return float(np.median(times[3:]))


def step_seconds(data: DataSet, study: Study, size: Size, repeats: int) -> dict[str, dict[str, float]]:
    """CPU time per step of each main model and of its code model."""
    small, seconds = data._replace(images=data.images[:512], labels=data.labels[:512]), {}
    for name in MAIN:
        variant = study.variant(name)
        training = begin_training(data, variant, size, steps=1000, seed=0)
        seconds[name] = {"step": cpu_seconds(training, repeats)}
        if variant.code_size is not None:
            training.images, training.labels = small.images, small.labels
            seconds[name]["code_step"] = cpu_seconds(begin_code_training(training, variant, seed=0), repeats)
    return seconds


def prepare(name: str, source: Path | None, folder: Path, size: Size, repeats: int) -> None:
    """Data, and what is written once: the referee, and the times per step on a CPU, by which training times are equal."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(STUDIES[name].data, source, folder)
    if not (folder / "data.json").exists():
        referee = Referee(data)
        torch.save(referee.state(), folder / "referee.pt")
        rows = torch.randperm(len(data.held_out_images), generator=torch.Generator().manual_seed(0))[:NUM_SAMPLES]
        facts = {
            "images": len(data.images),
            "held_out": len(data.held_out_images),
            "classes": len(data.class_names),
            "referee_accuracy": referee.accuracy,
            "real": referee.measure(data.held_out_images[rows], data.held_out_labels[rows]),
            "cpu_seconds": step_seconds(data, STUDIES[name], size, repeats),
            "size": asdict(size),
            "timed_on": f"{platform.machine()}, one thread, torch {torch.__version__}",
        }
        (folder / "data.json").write_text(json.dumps(facts, indent=1))


def training_seconds(name: str, study: Study, facts: dict) -> float:
    """CPU seconds of a whole training, its code model included."""
    seconds = facts["cpu_seconds"][name]
    return study.steps * seconds["step"] + study.code_steps * seconds.get("code_step", 0.0)


def steps_of(name: str, study: Study, facts: dict) -> int:
    """The class-only rival trains at least as long as any of the others."""
    if VARIANTS[name].recipe.prior_drop < 1:
        return study.steps
    longest = max(training_seconds(other, study, facts) for other in MAIN)
    return round(longest / facts["cpu_seconds"]["class-only"]["step"])


def measure(
    pipeline: DoDPipeline, setting: Setting, labels: torch.Tensor, data: DataSet, referee: Referee, seed: int
) -> tuple[dict, torch.Tensor]:
    images = draw(pipeline, setting, labels, data, seed)
    return {"setting": str(setting), "evaluations": setting.evaluations, **referee.measure(images, labels)}, images


def finish_runs(
    runs: list[tuple[str, int]],
    study: Study,
    size: Size,
    num_samples: int,
    data: DataSet,
    referee: Referee,
    folder: Path,
) -> None:
    """Trains the runs together, then measures each and adds it to the folder's records."""
    facts = json.loads((folder / "data.json").read_text())
    start = time.monotonic()
    variants, seeds = [study.variant(name) for name, _ in runs], [seed for _, seed in runs]
    trainings = [
        begin_training(data, variant, size, steps_of(name, study, facts), seed)
        for (name, seed), variant in zip(runs, variants)
    ]
    train_together(trainings)
    with_codes = [i for i, variant in enumerate(variants) if variant.code_size is not None]
    code_trainings = {i: begin_code_training(trainings[i], variants[i], seeds[i]) for i in with_codes}
    if code_trainings:
        train_together(list(code_trainings.values()))
    print(f"{folder.name}: {len(runs)} runs trained in {time.monotonic() - start:.0f} s", flush=True)
    labels = sample_labels(data, num_samples)
    for i, (name, seed) in enumerate(runs):
        pipeline = build_pipeline(data, trainings[i], code_trainings.get(i))
        rows = []
        for setting in settings(name, variants[i]):
            row, images = measure(pipeline, setting, labels, data, referee, seed)
            rows.append(row)
            if setting.source == "codes" and "copying" not in rows[0]:
                rows[0]["copying"] = copying(pipeline, labels, images, data, seed)
        record = {"variant": name, "seed": seed, "steps": trainings[i].recipe.steps, "rows": rows}
        device = torch.cuda.get_device_name() if data.images.is_cuda else platform.machine()
        record["parameters"] = {
            key: sum(p.numel() for p in model.parameters())
            for key, model in pipeline.components.items()
            if isinstance(model, torch.nn.Module)
        }
        record |= {"device": device, "torch": torch.__version__}
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "runs" / f"{name}-{seed}.json".replace(" ", "_")).write_text(json.dumps(record, indent=1))
        if seed == 0:
            pipeline.to("cpu").save_pretrained(folder / "models" / name.replace(" ", "_"))
    print(f"{folder.name}: measured after {time.monotonic() - start:.0f} s", flush=True)


def run_group(
    runs: list[tuple[str, int]], study: Study, size: Size, num_samples: int, folder: Path, device: str
) -> None:
    torch.set_num_threads(1)
    data = load_data(study.data, None, folder)
    data = DataSet(*(value.to(device) if torch.is_tensor(value) else value for value in data))
    referee = Referee.load(torch.load(folder / "referee.pt", weights_only=True), data)
    finish_runs(runs, study, size, num_samples, data, referee, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", choices=STUDIES)
    parser.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(MAIN))
    parser.add_argument("--steps", type=int, help="per run (default: the study's own)")
    parser.add_argument("--repeats", type=int, default=30, help="steps by which the times are measured")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="per figure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time on a CPU, one thread each")
    parser.add_argument("--prepare", action="store_true", help="only data, referee and times")
    args = parser.parse_args()

    for name in args.study:
        folder, study, size = args.output_dir / name, STUDIES[name], Size()
        prepare(name, args.source, folder, size, args.repeats)
        if args.prepare:
            continue
        done = {file.stem for file in (folder / "runs").glob("*.json")}
        runs = [(variant, seed) for seed in args.seeds for variant in args.variants]
        runs = [(v, seed) for v, seed in runs if f"{v}-{seed}".replace(" ", "_") not in done]
        study = study._replace(steps=args.steps or study.steps)
        shared = (study, size, args.num_samples, folder, args.device)
        if args.device != "cpu":
            run_group(runs, *shared)
            continue
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(run_group, [run], *shared) for run in runs]:
                future.result()


if __name__ == "__main__":
    main()

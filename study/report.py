"""Tables and plots of the study's runs.

    python study/report.py digits --output_dir outputs/study             # writes study/results/ and the tables
    python study/report.py digits --output_dir outputs/study --compare   # compares with the committed figures

Writes `<study>.json` (every figure of every run) and `<data set>-curves.png` to `study/results/`, and the tables to
`docs/evidence.md`, each between `<!-- <study>:<table> -->` and `<!-- end -->`; the README has the first one too.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib
from experiments import (
    ABLATIONS,
    ALL_STAGES,
    CLASS_ONLY_GUIDED,
    DOD_GUIDED,
    LONG,
    MORE_GUIDANCE,
    PAIR,
    REAL_PRIOR,
    RESULTS,
    RIVALS,
    SPLITS,
    STAGE,
    STUDIES,
)
from measure_model import Setting, unguided


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).parents[1]
REPORT, README = ROOT / "docs/evidence.md", ROOT / "README.md"
FIGURES = {
    "fd": ("FD", 1),
    "fd_pca": ("FD, PCA", 2),
    "accuracy": ("accuracy", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "density": ("density", 2),
    "coverage": ("coverage", 3),
}


class Results:
    """All rows of a study's runs, found by what they are of.

    `steps` are a run's; `equal_time` the class-only rival's steps in DoD's time.
    """

    def __init__(self, facts: dict, runs: list[dict]):
        self.facts, self.runs = facts, runs
        self.values: dict[tuple, dict[int, dict]] = defaultdict(dict)
        for run in runs:
            if run["variant"] == "class_only":
                self.steps, self.equal_time = run["steps"][-2:]
            for row in run["rows"]:
                key = (run["variant"], row["step"], row["setting"], row["stage"])
                self.values[key][run["seed"]] = row

    def seeds(self, variant: str, step: int, setting: Setting, stage: int) -> dict[int, dict]:
        """Rows by seed."""
        return self.values.get((variant, step, str(setting), stage), {})


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def figures(rows: dict[int, dict], names: list[str]) -> list[str]:
    return [spread([row[name] for row in rows.values()], FIGURES[name][1]) for name in names]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def configurations(results: Results) -> list[tuple[str, tuple]]:
    """What the main table compares: a name, and where its rows are."""
    steps = results.steps
    rows = [(f"DoD, stage {stage}", ("dod", steps, ALL_STAGES, stage)) for stage in (1, 2, 3, 4)]
    rows += [
        (f"DoD, {setting}", ("dod", steps, setting, len(setting.steps)))
        for setting in [*SPLITS, REAL_PRIOR, *DOD_GUIDED]
    ]
    rivals = [unguided(STAGE), LONG, *CLASS_ONLY_GUIDED]
    rows += [(f"class-only, {setting}", ("class_only", steps, setting, 1)) for setting in rivals]
    equal_time = results.equal_time
    rows += [(f"class-only, equal time, {setting}", ("class_only", equal_time, setting, 1)) for setting in rivals]
    return rows


def main_table(results: Results) -> str:
    names = list(FIGURES)
    rows = []
    for name, key in configurations(results):
        found = results.seeds(*key)
        if found:
            evaluations = next(iter(found.values()))["evaluations"]
            rows.append([name, f"{evaluations:g}", *figures(found, names)])
    real = results.facts["real"]
    rows.append(["held-out real images", "", *(f"{real[name]:.{FIGURES[name][1]}f}" for name in names)])
    return table(["", "evaluations", *(FIGURES[name][0] for name in names)], rows)


def ratio(results: Results, one: tuple, other: tuple, name: str) -> str:
    """Mean over seeds of one configuration's figure over another's, and each seed's."""
    return ratio_of_rows(results.seeds(*one), results.seeds(*other), name)


def ratio_of_rows(rows: dict[int, dict], rivals: dict[int, dict], name: str) -> str:
    """The same of rows by seed."""
    ratios = [row[name] / rivals[seed][name] for seed, row in sorted(rows.items()) if seed in rivals]
    return f"{statistics.mean(ratios):.2f} ({', '.join(f'{value:.2f}' for value in ratios)})"


def best(results: Results, variant: str, step: int, settings: list[Setting]) -> tuple:
    """The measured setting whose last stage has the least mean distance."""
    return nearest(results, measured(results, variant, step, settings))


def measured(results: Results, variant: str, step: int, settings: list[Setting]) -> list[tuple]:
    """Where the last stage's rows are, of the settings that have any."""
    keys = [(variant, step, setting, len(setting.steps)) for setting in settings]
    return [key for key in keys if results.seeds(*key)]


def nearest(results: Results, keys: list[tuple]) -> tuple:
    """The rows of the least mean distance."""
    return min(keys, key=lambda key: statistics.mean(row["fd"] for row in results.seeds(*key).values()))


def comparisons(results: Results) -> list[tuple[str, tuple, tuple]]:
    """What the study is about: a name, and where the rows of both are."""
    steps, equal_time = results.steps, results.equal_time
    stage_1, stage_2 = (("dod", steps, ALL_STAGES, stage) for stage in (1, 2))
    guided = best(results, "dod", steps, [setting for setting in DOD_GUIDED if setting.evaluations(2) <= 3 * STAGE])
    return [
        ("unguided: stage 2 / stage 1", stage_2, stage_1),
        ("unguided: stage 2 / class-only, equal steps and evaluations", stage_2, ("class_only", steps, LONG, 1)),
        ("unguided: stage 2 / class-only, equal time and evaluations", stage_2, ("class_only", equal_time, LONG, 1)),
        ("guided, each at its best: equal steps", guided, best(results, "class_only", steps, CLASS_ONLY_GUIDED)),
        ("guided, each at its best: equal time", guided, best(results, "class_only", equal_time, CLASS_ONLY_GUIDED)),
    ]


def best_split(results: Results) -> tuple[str, tuple, tuple]:
    """As of `comparisons`, with the unguided evaluations split between the stages as suits DoD best."""
    steps = results.steps
    candidates = [("dod", steps, ALL_STAGES, 2), *measured(results, "dod", steps, SPLITS)]
    key = nearest(results, candidates)
    split = "/".join(map(str, key[2].steps[: key[3]]))
    text = f"unguided: stages of {split} steps, the best of {len(candidates)} splits / class-only, equal steps and evaluations"
    return text, key, ("class_only", steps, LONG, 1)


STEPS_NEEDED = "unguided: share of the class-only model's steps that stage 2 needs to be as near"


def ratio_table(results: Results) -> str:
    names = ("fd", "fd_pca")
    marks = sorted({step for variant, step, *_ in results.values if variant == "dod"} - {results.steps})
    early = [
        (f"unguided: stage 2 / class-only after {step:,} steps", ("dod", step, PAIR, 2), ("class_only", step, LONG, 1))
        for step in marks
    ]
    rows = [
        [text, *(ratio(results, *keys, name) for name in names)]
        for text, *keys in [*early, *comparisons(results), best_split(results)]
    ]
    rows.append([STEPS_NEEDED, *(steps_needed(results, name) for name in names)])
    return table(["ratio of distances: mean (each seed, 0 first)", *(FIGURES[name][0] for name in names)], rows)


def summary_table(all_results: dict[str, Results]) -> str:
    """The ratios of distances in the classifier's features: a row for each study."""
    rows = []
    for name, of in all_results.items():
        figures = [ratio(of, *keys, "fd") for _, *keys in comparisons(of)]
        rows.append([f"{STUDIES[name].data}, {of.steps:,} steps", *figures, steps_needed(of, "fd")])
    head = [text for text, *_ in comparisons(next(iter(all_results.values())))]
    return table(["ratio of FD: mean (each seed, 0 first)", *head, STEPS_NEEDED], rows)


def steps_needed(results: Results, name: str) -> str:
    """Share of the class-only model's steps after which DoD's stage 2 is as near, each seed; between marks by a power law."""
    shares = []
    for seed, rival in sorted(results.seeds("class_only", results.steps, LONG, 1).items()):
        curve = []
        for (variant, step, setting, stage), rows in sorted(results.values.items()):
            if (variant, stage) == ("dod", 2) and setting in (str(PAIR), str(ALL_STAGES)) and seed in rows:
                curve.append((step, rows[seed][name]))
        reached = [number for number, (_, value) in enumerate(curve) if value <= rival[name]]
        if not reached:
            shares.append("not reached")
        elif reached[0] == 0:
            shares.append(f"below {curve[0][0] / results.steps:.2f}")
        else:
            (early, far), (late, near) = curve[reached[0] - 1 : reached[0] + 1]
            part = math.log(far / rival[name]) / math.log(far / near)
            shares.append(f"{early / results.steps * (late / early) ** part:.2f}")
    return ", ".join(shares)


def explanation_table(results: Results) -> str:
    rows = results.seeds("dod", results.steps, ALL_STAGES, 2)
    texts = {
        "code_fd": "Fréchet distance of stage 1's codes to real codes, over their variance",
        "stage_2_to_1": "root mean square difference of stage 2 from its stage 1",
        "nearest_training": "median distance of stage 2 to the nearest training image",
        "nearest_training_held_out": "the same of held-out real images",
    }
    lines = [[text, spread([row[key] for row in rows.values()], 3)] for key, text in texts.items()]
    return table(["", "mean ± standard deviation over seeds"], lines)


def ablation_table(results: Results) -> str:
    ablations = [run for run in results.runs if run["variant"] in ABLATIONS]
    seeds = {run["seed"] for run in ablations}
    lines = []
    for name in ("dod", *ABLATIONS):
        pair = ALL_STAGES if name == "dod" else PAIR
        keys = [(pair, 1), (pair, 2), (REAL_PRIOR, 2)]
        found = [results.seeds(name, results.steps, *key) for key in keys]
        stages = [[row for seed, row in rows.items() if seed in seeds] for rows in found]
        if not stages[1]:
            continue
        columns = [("fd", 1, stage) for stage in stages]
        columns += [
            ("fd_pca", 2, stages[1]),
            ("accuracy", 3, stages[1]),
            ("code_fd", 3, stages[1]),
            ("stage_2_to_1", 2, stages[1]),
        ]
        cells = [spread([row[figure] for row in rows], digits) for figure, digits, rows in columns]
        lines.append(["as in the main table" if name == "dod" else name, str(len(stages[1])), *cells])
    head = [
        "",
        "seeds",
        "stage 1",
        "stage 2",
        "real image as prior",
        "FD, PCA, stage 2",
        "accuracy, stage 2",
        "code distance",
        "stage 2 to 1",
    ]
    return table(head, lines)


def rival_table(results: Results) -> str:
    """The class-only model of other settings beside that of the main table, same seeds and steps."""
    names = ["fd", "fd_pca", "accuracy"]
    seeds = {run["seed"] for run in results.runs if run["variant"] in RIVALS}
    lines = []
    for name in ("class_only", *RIVALS):
        rows = results.seeds(name, results.steps, LONG, 1)
        if rows:
            title = "class-only, as in the main table" if name == "class_only" else name
            rows = {seed: row for seed, row in rows.items() if seed in seeds}
            lines.append([title, str(len(rows)), *figures(rows, names)])
    return table(["", "seeds", *(FIGURES[name][0] for name in names)], lines)


def guidance_table(results: Results) -> str:
    """Kinds of guidance below the plain one that is best, each over the rival's best.

    The rival's has no more evaluations than plain guidance of all stages, or than what it is compared with.
    """
    names = ["fd", "fd_pca", "accuracy", "recall", "coverage"]
    plain = {"dod": DOD_GUIDED, "class_only": CLASS_ONLY_GUIDED}
    # The rival's last checkpoint is that of equal time.
    steps = {"dod": results.steps, "class_only": results.equal_time}
    keys = []
    for variant, step in steps.items():
        keys.append(best(results, variant, step, plain[variant]))
        keys += measured(results, variant, step, MORE_GUIDANCE[variant])
    seeds = {seed for key in keys if key[2] in MORE_GUIDANCE[key[0]] for seed in results.seeds(*key)}
    rows = {key: {seed: row for seed, row in results.seeds(*key).items() if seed in seeds} for key in keys}
    evaluations = {key: key[2].evaluations(key[3]) for key in keys}
    distances = {key: statistics.mean(row["fd"] for row in found.values()) for key, found in rows.items()}
    lines = []
    for key, found in rows.items():
        most = max(evaluations[key], 3 * STAGE)
        rivals = [other for other in keys if other[0] == "class_only" and evaluations[other] <= most]
        rival = rows[min(rivals, key=lambda other: distances[other])]
        title = "DoD" if key[0] == "dod" else "class-only, equal time"
        lines.append(
            [f"{title}, {key[2]}", f"{evaluations[key]:g}", *figures(found, names), ratio_of_rows(found, rival, "fd")]
        )
    head = ["", "evaluations", *(FIGURES[name][0] for name in names), "FD over class-only's best"]
    return table(head, lines)


def plot_curves(studies: list[Results], path: Path) -> None:
    """Unguided distance of all studies of a data set against training steps, and against training time."""
    values: dict[tuple, dict[int, dict]] = {}
    for results in studies:
        values |= results.values
    step_ratio = studies[-1].facts["step_time_ratio"]
    lines = [
        (f"class-only, {2 * STAGE} evaluations", "class_only", [LONG], 1, 1.0),
        (f"DoD, stage 1, {STAGE} evaluations", "dod", [PAIR, ALL_STAGES], 1, step_ratio),
        (f"DoD, stage 2, {2 * STAGE} evaluations", "dod", [PAIR, ALL_STAGES], 2, step_ratio),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, by_time in zip(axes, (False, True)):
        for label, variant, settings, stage, cost in lines:
            texts = {str(setting) for setting in settings}
            points = {
                step: [row["fd"] for row in rows.values()]
                for (of, step, text, number), rows in values.items()
                if (of, number) == (variant, stage) and text in texts
            }
            marks = sorted(points)
            x = [step * (cost if by_time else 1) for step in marks]
            axis.plot(x, [statistics.mean(points[step]) for step in marks], marker="o", label=label)
            axis.fill_between(x, *([edge(points[step]) for step in marks] for edge in (min, max)), alpha=0.2)
        axis.set_xlabel("training time, in class-only steps" if by_time else "training steps")
        axis.set_xscale("log")
        axis.set_yscale("log")
    axes[0].set_ylabel("Fréchet distance, unguided")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(results: Results, committed: Results) -> None:
    """Says how the distances of this machine's runs lie to the committed ones."""
    outside = 0
    for key, rows in sorted(results.values.items()):
        before = [row["fd"] for row in committed.values.get(key, {}).values()]
        now = [row["fd"] for row in rows.values()]
        if not before or key[0] not in ("dod", "class_only"):
            continue
        # Three times the seeds' standard deviation, or 15 % where that is more.
        margin = max(3 * statistics.stdev(before) if len(before) > 1 else 0, 0.15 * statistics.mean(before))
        difference = statistics.mean(now) - statistics.mean(before)
        outside += abs(difference) > margin
        print(
            f"{'OUTSIDE' if abs(difference) > margin else 'within '} {key}: {spread(now, 1)}, committed {spread(before, 1)}"
        )
    print(f"{outside} of the figures lie outside three standard deviations of the committed ones.")


def tables_of(results: Results) -> dict[str, Callable[[Results], str]]:
    tables = {"main": main_table, "ratios": ratio_table, "why": explanation_table}
    if any(run["variant"] in ABLATIONS for run in results.runs):
        tables["ablations"] = ablation_table
    if any(run["variant"] in RIVALS for run in results.runs):
        tables["rivals"] = rival_table
    more = {str(setting) for settings in MORE_GUIDANCE.values() for setting in settings}
    if any(row["setting"] in more for run in results.runs for row in run["rows"]):
        tables["guidance"] = guidance_table
    return tables


def load_committed() -> dict[str, Results]:
    """What study/results holds, in the order of `STUDIES`."""
    files = {name: RESULTS / f"{name}.json" for name in STUDIES}
    return {name: Results(**json.loads(file.read_text())) for name, file in files.items() if file.exists()}


def load(folder: Path) -> Results:
    """What `run_study.py` wrote."""
    runs = [json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))]
    return Results(json.loads((folder / "data.json").read_text()), runs)


def put_table(page: str, title: str, text: str) -> str:
    """The text of a page with one of its tables replaced."""
    start, end = f"<!-- {title} -->\n", "\n<!-- end -->"
    before, rest = page.split(start)
    return before + start + text + end + rest.split(end, 1)[1]


def regenerate(report: str, readme: str, committed: dict[str, Results]) -> tuple[str, str]:
    """Both pages with all tables made again from the committed results."""
    for name, results in committed.items():
        for title, make in tables_of(results).items():
            report = put_table(report, f"{name}:{title}", make(results))
    summary = summary_table(committed)
    return put_table(report, "all:summary", summary), put_table(readme, "all:summary", summary)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    new = {name: load(args.output_dir / name) for name in args.study}
    if args.compare:
        committed = load_committed()
        for name, results in new.items():
            print(f"## {name}\n\n{ratio_table(results)}\n")
            compare(results, committed[name])
        return
    for name, results in new.items():
        text = json.dumps({"facts": results.facts, "runs": results.runs}, indent=0)
        (RESULTS / f"{name}.json").write_text(text + "\n")
    committed = load_committed()
    for data in {STUDIES[name].data for name in args.study}:
        studies = [results for name, results in committed.items() if STUDIES[name].data == data]
        plot_curves(studies, RESULTS / f"{data}-curves.png")
    report, readme = regenerate(REPORT.read_text(), README.read_text(), committed)
    REPORT.write_text(report)
    README.write_text(readme)


if __name__ == "__main__":
    main()

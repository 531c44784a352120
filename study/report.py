"""Tables and a plot of the study's runs, in docs/evidence.md and the README.

    python study/report.py digits letters emoji --output_dir outputs/study   # collects the runs, writes tables and plot
    python study/report.py digits letters emoji                              # from study/results/ alone
    python study/report.py digits --output_dir outputs/study --compare       # changes nothing

A table stands between `<!-- NAME -->` and `<!-- end -->`. Best settings are chosen by their mean over the seeds, of those that
`experiments.settings` lists.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import examples_path  # noqa: F401
import numpy as np
import torch
from experiments import MAIN, OPTIONS, RESULTS, STUDIES, VARIANTS, Setting, Variant, settings
from models import build_transformer

from diffusers_dod.training.flops import transformer_flops


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/evidence.md", ROOT / "README.md")
CODE_STEPS = 30
MOST = 36  # evaluations that a setting may take
STAGES = {"class-only": (24,), "two stages": (12, 12), "narrow codes": (20,), "wide codes": (20,)}  # in the plot


class Results:
    """All rows of a data set's runs: `rows[variant][setting][seed]`."""

    def __init__(self, name: str):
        self.name = name
        record = json.loads((RESULTS / f"{name}.json").read_text())
        self.facts, self.runs = record["facts"], record["runs"]
        self.rows: dict[str, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
        for run in self.runs:
            for row in run["rows"]:
                self.rows[run["variant"]][row["setting"]][run["seed"]] = row
        self.code_costs = {name: self.code_evaluations(variant) for name, variant in VARIANTS.items()}

    def code_evaluations(self, variant: Variant) -> float:
        """What the code model's steps cost, in forwards of the backbone, by FLOPs."""
        if variant.code_size is None:
            return 0.0
        channels, side = self.facts["shape"]
        size, (grid, dim), (width, layers) = self.facts["size"], variant.bottleneck, variant.code_size
        with torch.device("meta"):
            backbone = build_transformer(
                channels, side, side // variant.tokens, size["width"], size["layers"], 10, True
            )
            model = build_transformer(dim, grid, grid, width, layers, 10, False)
        return CODE_STEPS * transformer_flops(model) / transformer_flops(backbone)

    def evaluations(self, name: str, setting: Setting) -> float:
        """Forwards of the backbone per sample, the code model's included."""
        return setting.evaluations + (self.code_costs[name] if setting.source == "codes" else 0.0)

    def best(self, name: str, guided: bool = True) -> Setting:
        """The UniPC setting with the least mean distance, of those within `MOST` evaluations."""
        wanted = [s for s in settings(name, MAIN[name]) if s.source != "real" and s.solver == "UniPC"]
        wanted = [s for s in wanted if self.evaluations(name, s) <= MOST]
        if not guided:
            wanted = [s for s in wanted if set(s.guidance) == {1.0}]
        return min(wanted, key=lambda s: self.mean(name, str(s), "fd"))

    def values(self, name: str, setting: str, figure: str) -> dict[int, float]:
        return {seed: row[figure] for seed, row in sorted(self.rows[name][setting].items())}

    def mean(self, name: str, setting: str, figure: str) -> float:
        return statistics.mean(self.values(name, setting, figure).values())


def spread(values: dict[int, float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values.values())
    return f"{statistics.mean(values.values()):.{digits}f} ({each})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ratios(one: dict[int, float], other: dict[int, float], seeds: str = "") -> str:
    """The ratio of the means, and each seed's after the word `seeds`."""
    each = ", ".join(f"{one[seed] / other[seed]:.2f}" for seed in one)
    return f"{statistics.mean(one.values()) / statistics.mean(other.values()):.2f} ({seeds}{each})"


def described(setting: Setting) -> str:
    """A setting as the tables have it: without its source and what all settings of codes share."""
    return str(setting).partition(", ")[2].replace(", noise level 0.3", "")


def main_table(studies: list[Results]) -> str:
    """Distances of every model without guidance, with either solver, and at its best."""
    rows = []
    for results in studies:
        for name in MAIN:
            plain, best = results.best(name, guided=False), results.best(name)
            euler = next(str(s) for s in settings(name, MAIN[name]) if s.solver == "Euler")
            row = [results.name, name, f"{results.mean(name, euler, 'fd'):.1f}"]
            row += [spread(results.values(name, str(plain), "fd"), 1), described(best)]
            row += [f"{results.evaluations(name, best):.1f}", spread(results.values(name, str(best), "fd"), 1)]
            row += [
                f"{results.mean(name, str(best), 'fd_pca'):.1f}",
                f"{results.mean(name, str(best), 'accuracy'):.3f}",
            ]
            rows.append(row)
    head = ["data", "model", "FD, unguided, Euler", "FD, unguided", "best: setting", "evaluations", "FD", "FD, pixels"]
    return table([*head, "accuracy"], rows)


def ratio_table(studies: list[Results]) -> str:
    """Each model at its best over the class-only model at its best, within as many evaluations."""
    rows = []
    for results in studies:
        for name in list(MAIN)[1:]:
            row = [results.name, name]
            for figure, guided in (("fd", True), ("fd_pca", True), ("fd", False)):
                pair = [results.values(n, str(results.best(n, guided)), figure) for n in (name, "class-only")]
                row.append(ratios(*pair))
            rows.append(row)
    head = ["data", "model", "FD: both at their best", "FD, pixels: the same settings", "FD: unguided"]
    return table(head, rows)


def copying_table(studies: list[Results]) -> str:
    """Distances to the nearest training code and image, generated beside held out."""
    rows = []
    for results in studies:
        for name in MAIN:
            coded = [run for run in results.runs if run["variant"] == name and MAIN[name].code_size is not None]
            found = {run["seed"]: run["rows"][0]["copying"] for run in coded}
            if found:
                row = [results.name, name]
                for key, digits in (("code", 2), ("code_held_out", 2), ("image", 3), ("image_held_out", 3)):
                    row.append(f"{statistics.mean(values[key] for values in found.values()):.{digits}f}")
                rows.append(row)
    return table(["data", "model", "code: generated", "code: held out", "image: generated", "image: held out"], rows)


def option_table(studies: list[Results]) -> str:
    """Distances of the changes that were tried, below those of the model without them."""
    rows = []
    for results in studies:
        for name in (name for name in OPTIONS if results.rows[name]):
            variant = VARIANTS[name]
            tried = settings(name, variant)
            for first in range(0, len(tried), 3):
                plain, guided, real = map(str, tried[first : first + 3])
                level = f", sampled at {tried[first].noise_level:g}" if variant.reads_noise_level else ""
                row = [results.name, name + level]
                row += [spread(results.values(name, setting, "fd"), 1) for setting in (plain, guided, real)]
                rows.append([*row, f"{results.mean(name, guided, 'fd_pca'):.1f}"])
    head = [
        "data",
        "model",
        "FD, unguided",
        "FD, guidance 1.5",
        "FD, unguided, codes of training images",
        "FD, pixels, guidance 1.5",
    ]
    return table(head, rows)


def plot(studies: list[Results], path: Path) -> None:
    """Distance against guidance scale, a panel per data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(studies), 4.0), layout="constrained")
    for axes, results in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies):
        for name in MAIN:
            shown = [
                setting
                for setting in settings(name, MAIN[name])
                if setting.source != "real"
                and len(set(setting.guidance)) == 1
                and (setting.steps, setting.solver) == (STAGES[name], "UniPC")
            ]
            points = {setting.guidance[-1]: results.mean(name, str(setting), "fd") for setting in shown}
            label = f"{name}, {' + '.join(map(str, STAGES[name]))} steps"
            axes.plot(*zip(*sorted(points.items())), marker="o", label=label)
        axes.set(title=results.name, xlabel="guidance of every stage", ylabel="FD, classifier", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def summary_table(studies: list[Results]) -> str:
    """For the README: the distances of class-only and of wide codes, each at its best, and their ratio."""
    rows = []
    for results in studies:
        settings_of = {name: results.best(name) for name in ("class-only", "wide codes")}
        values = {name: results.values(name, str(setting), "fd") for name, setting in settings_of.items()}
        row = [results.name]
        for name, setting in settings_of.items():
            mean, evaluations = statistics.mean(values[name].values()), results.evaluations(name, setting)
            row.append(f"distance {mean:.1f} with {evaluations:.0f} evaluations")
        rows.append([*row, ratios(values["wide codes"], values["class-only"], "per seed: ")])
    return table(["images", "class-only", "DoD, one stage from wide codes", "ratio of the unrounded distances"], rows)


TABLES = {
    "summary": summary_table,
    "main": main_table,
    "ratios": ratio_table,
    "copying": copying_table,
    "options": option_table,
}


def read_runs(name: str, folder: Path) -> list[dict]:
    """The records of a data set's folder, of settings that `experiments.py` has."""
    runs = [json.loads(file.read_text()) for file in sorted((folder / name / "runs").glob("*.json"))]
    for run in runs:
        known = {str(setting) for setting in settings(run["variant"], VARIANTS[run["variant"]])}
        run["rows"] = [row for row in run["rows"] if row["setting"] in known]
    return runs


def collect(name: str, folder: Path) -> dict:
    """The records of a data set's folder as one; what the folder has no runs of stays as it is committed."""
    runs = read_runs(name, folder)
    variants = {run["variant"] for run in runs}
    committed = json.loads((RESULTS / f"{name}.json").read_text())
    if not variants & {*MAIN}:
        facts = committed["facts"]
    else:
        facts = json.loads((folder / name / "data.json").read_text())
        with np.load(folder / name / "data.npz", allow_pickle=False) as arrays:
            facts["shape"] = list(arrays["images"].shape[1:3])
    return {
        "facts": facts,
        "runs": [run for run in committed["runs"] if run["variant"] in {*VARIANTS} - variants] + runs,
    }


def fill(text: str, studies: list[Results]) -> str:
    """A page with its tables made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            made = make(studies)
            text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, help="folder of run_study.py")
    parser.add_argument("--compare", action="store_true", help="print new figures beside the committed ones")
    args = parser.parse_args()
    if args.compare:
        for name in args.study:
            old = Results(name)
            for run in read_runs(name, args.output_dir):
                for row in run["rows"]:
                    known = old.values(run["variant"], row["setting"], "fd").get(run["seed"])
                    print(
                        f"{name}, {run['variant']}, seed {run['seed']}, {row['setting']}: {row['fd']:.2f}, committed {known:.2f}"
                    )
        return
    if args.output_dir is not None:
        for name in args.study:
            text = json.dumps(collect(name, args.output_dir), indent=1)
            (RESULTS / f"{name}.json").write_text(re.sub(r"(\d\.\d{5})\d+", r"\1", text) + "\n")
    studies = [Results(name) for name in args.study]
    for page in PAGES:
        page.write_text(fill(page.read_text(), studies))
    plot(studies, RESULTS / "guidance.png")


if __name__ == "__main__":
    main()

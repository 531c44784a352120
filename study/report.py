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
from experiments import (
    MAIN,
    NOISE_LEVELS,
    OPTIONS,
    RESULTS,
    SAMPLED_LEVEL,
    SOLVED,
    STAGE,
    STUDIES,
    Setting,
    Variant,
    settings,
)
from models import build_transformer

from diffusers_dod.training.flops import transformer_flops


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/evidence.md", ROOT / "README.md")
CODE_STEPS = 30
LABELS = {"class-only": "24 steps", "DoD": "12 + 12", "narrow codes": "12 steps", "wide codes": "12 steps"}


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
        self.code_costs = {name: self.code_evaluations(variant) for name, variant in (MAIN | SOLVED).items()}

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
        codes = self.code_costs[name] if setting.source == "codes" else 0.0
        return setting.evaluations + codes

    def best(self, name: str, most_evaluations: float, guided: bool = True, figure: str = "fd") -> Setting:
        """The setting with the least mean of a figure, of those within a number of evaluations."""
        wanted = [s for s in settings(name, (MAIN | SOLVED)[name]) if s.source != "real" and str(s) in self.rows[name]]
        wanted = [s for s in wanted if self.evaluations(name, s) <= most_evaluations]
        if not guided:
            wanted = [s for s in wanted if set(s.guidance) == {1.0} and s.code_guidance == 1.0]
        return min(wanted, key=lambda s: self.mean(name, str(s), figure))

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


def ratios(one: dict[int, float], other: dict[int, float]) -> str:
    return spread({seed: one[seed] / other[seed] for seed in one if seed in other}, 2)


def main_table(studies: list[Results]) -> str:
    """Distances of every model without guidance and at its best."""
    rows = []
    for results in studies:
        for name in MAIN:
            plain, best = results.best(name, 36, guided=False), results.best(name, 36)
            how, evaluations = str(best).partition(", ")[2], f"{results.evaluations(name, best):.1f}"
            row = [results.name, name, spread(results.values(name, str(plain), "fd"), 1), how, evaluations]
            row.append(spread(results.values(name, str(best), "fd"), 1))
            row += [
                f"{results.mean(name, str(best), 'fd_pca'):.1f}",
                f"{results.mean(name, str(best), 'accuracy'):.3f}",
            ]
            rows.append(row)
    head = ["data", "model", "unguided: FD", "best: setting", "evaluations", "FD", "FD, pixels", "accuracy"]
    return table(head, rows)


def ratio_table(studies: list[Results]) -> str:
    """Each model at its best over the class-only model at its best, within as many evaluations."""
    rows = []
    for results in studies:
        rival = str(results.best("class-only", 36))
        for name in list(MAIN)[1:]:
            ours = str(results.best(name, 36))
            row = [results.name, name]
            for figure in ("fd", "fd_pca"):
                row.append(ratios(results.values(name, ours, figure), results.values("class-only", rival, figure)))
            plain = (str(results.best(n, 36, guided=False)) for n in (name, "class-only"))
            pair = [results.values(n, s, "fd") for n, s in zip((name, "class-only"), plain)]
            rows.append([*row, ratios(*pair)])
    head = [
        "data",
        "model",
        "FD, classifier: both at their best",
        "FD, pixels: the same settings",
        "FD, classifier: unguided",
    ]
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
        for group, base in {"narrow": ["narrow codes"], "wide": ["wide codes"], "7x7 tokens": []}.items():
            tried = [name for name in OPTIONS if name.startswith(f"{group},") and results.rows[name]]
            for name in [*base, *tried] if tried else []:
                variant = (MAIN | OPTIONS)[name]
                for level in NOISE_LEVELS if variant.option == "noise level" else (None,):
                    row = [results.name, name if level is None else f"{name}, sampled at {level:g}"]
                    for source, scale in (("codes", 1.0), ("codes", 1.5), ("real", 1.0)):
                        setting = str(Setting(source, (STAGE,), (scale,), noise_level=level))
                        row.append(spread(results.values(name, setting, "fd"), 1))
                    setting = str(Setting("codes", (STAGE,), (1.5,), noise_level=level))
                    rows.append([*row, f"{results.mean(name, setting, 'fd_pca'):.1f}"])
    head = [
        "data",
        "model",
        "FD, unguided",
        "FD, guidance 1.5",
        "FD, codes of real images",
        "FD, pixels, guidance 1.5",
    ]
    return table(head, rows)


def solver_table(studies: list[Results]) -> str:
    """The same models sampled with Euler and with UniPC, and their ratio at their best."""
    rows = []
    for results in studies:
        names = [name for name in SOLVED if results.rows[name]]
        for name in names:
            plain = [str(setting) for setting in settings(name, SOLVED[name])[:2]]  # unguided: Euler, UniPC
            best, rival = results.best(name, 36), str(results.best(names[0], 36))
            row = [results.name, name.removesuffix(", two solvers")]
            row += [spread(results.values(name, setting, "fd"), 1) for setting in plain]
            setting = str(best).partition(", ")[2].replace(f", noise level {SAMPLED_LEVEL:g}", "")
            row += [setting, f"{results.evaluations(name, best):.1f}"]
            row += [spread(results.values(name, str(best), figure), 1) for figure in ("fd", "fd_pca")]
            for figure in ("fd", "fd_pca"):
                ratio = ratios(results.values(name, str(best), figure), results.values(names[0], rival, figure))
                row.append("" if name == names[0] else ratio)
            rows.append(row)
    head = ["data", "model", "unguided: Euler", "unguided: UniPC", "best: setting", "evaluations", "FD", "FD, pixels"]
    return table([*head, "ratio to class-only: FD", "ratio: pixels"], rows)


def plot(studies: list[Results], path: Path) -> None:
    """Distance against guidance scale, a panel per data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(studies), 3.4), layout="constrained")
    for axes, results in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies):
        for name in MAIN:
            points = {}
            for setting in settings(name, MAIN[name]):
                shown = (
                    len(setting.steps) == 2
                    if name == "DoD"
                    else setting.code_guidance == 1.0 and len(setting.steps) == 1
                )
                shown = shown and setting.guidance != (2.0, 1.25)
                if setting.source != "real" and shown and setting.steps[0] != 2 * STAGE or name == "class-only":
                    points[setting.guidance[-1]] = results.mean(name, str(setting), "fd")
            axes.plot(*zip(*sorted(points.items())), marker="o", label=f"{name}, {LABELS[name]}")
        axes.set(title=results.name, xlabel="guidance of the last stage", ylabel="FD, classifier", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def summary_table(studies: list[Results]) -> str:
    """For the README: the distances of class-only and of wide codes, each at its best, and their ratio."""
    rows = []
    for results in studies:
        settings_of = {name: results.best(name, 36) for name in ("class-only", "wide codes")}
        values = {name: results.values(name, str(setting), "fd") for name, setting in settings_of.items()}
        row = [results.name]
        for name, setting in settings_of.items():
            row.append(
                f"{statistics.mean(values[name].values()):.1f} in {results.evaluations(name, setting):.0f} evaluations"
            )
        rows.append([*row, ratios(values["wide codes"], values["class-only"])])
    return table(["data", "class-only", "one stage from a code model", "ratio: mean (each seed)"], rows)


TABLES = {
    "summary": summary_table,
    "main": main_table,
    "ratios": ratio_table,
    "copying": copying_table,
    "options": option_table,
    "solvers": solver_table,
}


def read_runs(name: str, folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / name / "runs").glob("*.json"))]


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
    return {"facts": facts, "runs": [run for run in committed["runs"] if run["variant"] not in variants] + runs}


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

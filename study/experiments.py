"""What the study trains, and how each model is sampled."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from training import Recipe


# The committed figures
RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = 1000
STAGE = 12  # steps per stage


@dataclass(frozen=True)
class Size:
    """Of the backbone."""

    width: int = 128
    heads: int = 4
    layers: int = 4


@dataclass(frozen=True)
class Variant:
    """A model of the study.

    Args:
        recipe (`Recipe`): of backbone and embedder; its steps are those of the data set.
        bottleneck (pair of `int`): side of the codes' grid, and channels per code.
        tokens (`int`): side of the backbone's grid of tokens, whatever the images' size.
        code_size (pair of `int`, *optional*): width and layers of the code model; `None` trains none.
        code_steps (`int`): steps of the code model.
        option (`str`, *optional*): `"quantised"` or `"presence"` of `options.py`, or the package's `"noise level"` as input.
    """

    recipe: Recipe
    bottleneck: tuple[int, int] = (2, 4)
    tokens: int = 4
    code_size: tuple[int, int] | None = None
    code_steps: int = 2000
    option: str | None = None


CODE_RECIPE = Recipe(steps=0, batch_size=256, learning_rate=2e-3, logit_mean=0.0)
CLASS_ONLY = Variant(Recipe(steps=0))
DOD = Variant(Recipe(steps=0, prior_drop=0.5, code_noise=0.3))
NARROW = Variant(Recipe(steps=0, prior_drop=0.25, code_noise=0.3), code_size=(96, 3))
WIDE = Variant(Recipe(steps=0, prior_drop=0.125, code_noise=0.3), bottleneck=(4, 4), code_size=(192, 3))
MAIN = {"class-only": CLASS_ONLY, "DoD": DOD, "narrow codes": NARROW, "wide codes": WIDE}


def with_recipe(variant: Variant, **changes) -> Variant:
    return replace(variant, recipe=replace(variant.recipe, **changes))


# Changes that were tried
OPTIONS = {
    "narrow, near noise": with_recipe(NARROW, near_noise=0.1),
    "wide, near noise": with_recipe(WIDE, near_noise=0.1),
    "narrow, noise level": replace(with_recipe(NARROW, code_noise=(0.0, 1.0)), option="noise level"),
    "wide, noise level": replace(with_recipe(WIDE, code_noise=(0.0, 1.0)), option="noise level"),
    "narrow, presence": replace(NARROW, option="presence"),
    "wide, presence": replace(WIDE, option="presence"),
    "wide, quantised": replace(WIDE, option="quantised"),
    "narrow, prior drop 0.125": with_recipe(NARROW, prior_drop=0.125),
    "wide, code noise 0.6": with_recipe(WIDE, code_noise=0.6),
    "wide, code noise 0.6, 500 code steps": replace(with_recipe(WIDE, code_noise=0.6), code_steps=500),
    "wide, 16 channels": replace(WIDE, bottleneck=(4, 16), code_size=(256, 4)),
    # A grid of codes finer than the tokens would be averaged to theirs.
    "7x7 tokens, 4x4 codes": replace(WIDE, tokens=7),
    "7x7 tokens, 7x7 codes": replace(WIDE, tokens=7, bottleneck=(7, 4), code_size=(256, 4)),
}
NOISE_LEVELS = (0.0, 0.3, 0.6)

# Models sampled by two solvers. On emoji, a code model of 2,000 steps copies.
SAMPLED_LEVEL = 0.3  # the pipeline's default
SOLVED = {
    "class-only, two solvers": CLASS_ONLY,
    "noise level, two solvers": OPTIONS["wide, noise level"],
    "noise level, 500 code steps, two solvers": replace(OPTIONS["wide, noise level"], code_steps=500),
}


class Study(NamedTuple):
    """A data set of `data_sets.py`, and the steps of a run on it."""

    data: str
    steps: int


STUDIES = {"digits": Study("digits", 4000), "letters": Study("letters", 8000), "emoji": Study("emoji", 8000)}


@dataclass(frozen=True)
class Setting:
    """How to sample.

    Args:
        source (`str`): `"stage"`, `"codes"` or `"real"`, codes of real training images.
        steps (`tuple` of `int`), guidance (`tuple` of `float`): one entry per stage.
        code_guidance (`float`): of the code model.
        noise_level (`float`, *optional*): noise on the codes, for an embedder that is told the level.
        solver (`str`): of stages and code model, `"Euler"` or `"UniPC"`.
    """

    source: str
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    code_guidance: float = 1.0
    noise_level: float | None = None
    solver: str = "Euler"

    @property
    def evaluations(self) -> float:
        """Forwards of the transformer per sample; guidance acts in the middle half of the steps."""
        return sum(steps * (1 + 0.5 * (scale != 1)) for steps, scale in zip(self.steps, self.guidance))

    def __str__(self) -> str:
        guidance = "/".join(f"{scale:g}" for scale in self.guidance)
        text = f"{self.source}, {'/'.join(map(str, self.steps))} steps, guidance {guidance}"
        text += f", codes guided {self.code_guidance:g}" if self.code_guidance != 1 else ""
        text += f", noise level {self.noise_level:g}" if self.noise_level is not None else ""
        return text + (f", {self.solver}" if self.solver != "Euler" else "")


def settings(name: str, variant: Variant) -> list[Setting]:
    """How a model is sampled: class-only and DoD in 24 steps, from codes in 12 and in 24; briefly where an option is tried."""
    real = Setting("real", (STAGE,), (1.0,))
    if name in SOLVED:
        if variant.code_size is None:
            found = [Setting("stage", (2 * STAGE,), (scale,)) for scale in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)]
        else:
            pairs = [(12, 1.0), (12, 2.0), (20, 2.0), (20, 3.0), (20, 4.0), (24, 1.0)]
            found = [Setting("codes", (steps,), (scale,), noise_level=SAMPLED_LEVEL) for steps, scale in pairs]
        return [found[0], *(replace(setting, solver="UniPC") for setting in found)]
    if name in OPTIONS:
        found = [*(Setting("codes", (STAGE,), (scale,)) for scale in (1.0, 1.5)), real]
        found += [Setting("codes", (20,), (2.0,), code_guidance=scale) for scale in (1.0, 1.5)]
        levels = NOISE_LEVELS if variant.option == "noise level" else (None,)
        return [replace(setting, noise_level=level) for level in levels for setting in found]
    if variant.recipe.prior_drop == 1:
        return [Setting("stage", (2 * STAGE,), (scale,)) for scale in (1.0, 1.5, 2.0, 2.5, 3.0)]
    if variant.code_size is None:
        pairs = [(1.0, 1.0), (1.5, 1.0), (1.5, 1.25), (1.5, 1.5), (2.0, 1.25), (2.0, 2.0)]
        found = [Setting("stage", (STAGE, STAGE), pair) for pair in pairs]
        return [*found, *(Setting("stage", (STAGE,), (scale,)) for scale in (1.0, 1.5)), real]
    found = [Setting("codes", (STAGE,), (scale,)) for scale in (1.0, 1.25, 1.5, 2.0)]
    found += [Setting("codes", (2 * STAGE,), (scale,)) for scale in (1.0, 1.5, 2.0)]
    found += [Setting("codes", (STAGE,), (scale,), code_guidance=1.5) for scale in (1.0, 1.5)]
    return [*found, Setting("codes", (STAGE, STAGE), (1.25, 1.25)), real]

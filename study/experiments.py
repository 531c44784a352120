"""What the study trains, and how each model is sampled."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from training import Recipe


# The committed figures
RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = 1000


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
        code_steps (`int`, *optional*): steps of the code model, by default those of the data set.
        option (`str`, *optional*): `"quantised"` or `"presence"` of `options.py`.
        noise_levels (`tuple` of `float`): on the codes in sampling, for an embedder that reads the level.
    """

    recipe: Recipe
    bottleneck: tuple[int, int] = (2, 4)
    tokens: int = 4
    code_size: tuple[int, int] | None = None
    code_steps: int | None = None
    option: str | None = None
    noise_levels: tuple[float, ...] = (0.3,)  # the pipeline's default

    @property
    def reads_noise_level(self) -> bool:
        return isinstance(self.recipe.code_noise, tuple)


def with_recipe(variant: Variant, **changes) -> Variant:
    return replace(variant, recipe=replace(variant.recipe, **changes))


CODE_RECIPE = Recipe(steps=0, batch_size=256, learning_rate=2e-3, logit_mean=0.0)
CLASS_ONLY = Variant(Recipe(steps=0))
DOD = Variant(Recipe(steps=0, prior_drop=0.5, code_noise=0.3))
NARROW = Variant(Recipe(steps=0, prior_drop=0.25, code_noise=(0.0, 1.0)), code_size=(96, 3))
WIDE = Variant(Recipe(steps=0, prior_drop=0.125, code_noise=(0.0, 1.0)), bottleneck=(4, 4), code_size=(192, 3))
MAIN = {"class-only": CLASS_ONLY, "two stages": DOD, "narrow codes": NARROW, "wide codes": WIDE}

# Changes that were tried; but for "noise level", on models whose codes get noise of one size
FIXED_NARROW, FIXED_WIDE = (with_recipe(variant, code_noise=0.3) for variant in (NARROW, WIDE))
OPTIONS = {
    "narrow, fixed noise": FIXED_NARROW,
    "narrow, near noise": with_recipe(FIXED_NARROW, near_noise=0.1),
    "wide, fixed noise": FIXED_WIDE,
    "wide, fixed noise, 2000 code steps": replace(FIXED_WIDE, code_steps=2000),
    "wide, fixed noise 0.6": with_recipe(WIDE, code_noise=0.6),
    "wide, near noise": with_recipe(FIXED_WIDE, near_noise=0.1),
    "wide, noise level": replace(WIDE, noise_levels=(0.0, 0.3, 0.6)),
    "wide, presence": replace(FIXED_WIDE, option="presence"),
    "wide, quantised": replace(FIXED_WIDE, option="quantised"),
    "wide, 16 channels": replace(FIXED_WIDE, bottleneck=(4, 16), code_size=(256, 4)),
    # A grid of codes finer than the tokens would be averaged to theirs.
    "wide, 7x7 tokens": replace(FIXED_WIDE, tokens=7),
    "wide, 7x7 tokens and codes": replace(FIXED_WIDE, tokens=7, bottleneck=(7, 4), code_size=(256, 4)),
}
VARIANTS = MAIN | OPTIONS


class Study(NamedTuple):
    """A data set of `data_sets.py`, and the steps of a run on it."""

    data: str
    steps: int
    code_steps: int

    def variant(self, name: str) -> Variant:
        """A model, its code model's steps filled in."""
        variant = VARIANTS[name]
        return replace(variant, code_steps=variant.code_steps or self.code_steps)


# After 2,000 steps on so few emoji, the code model copies.
STUDIES = {
    "digits": Study("digits", 4000, 2000),
    "letters": Study("letters", 8000, 2000),
    "emoji": Study("emoji", 8000, 500),
}


@dataclass(frozen=True)
class Setting:
    """How to sample.

    Args:
        source (`str`): `"stage"`, `"codes"` or `"real"`, codes of real training images.
        steps (`tuple` of `int`): one entry per stage.
        guidance (`tuple` of `float`): one entry per stage.
        noise_level (`float`, *optional*): noise on the codes, for an embedder that reads the level.
        solver (`str`): of stages and code model, `"Euler"` or `"UniPC"`.
    """

    source: str
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    noise_level: float | None = None
    solver: str = "UniPC"

    @property
    def evaluations(self) -> float:
        """Forwards of the transformer per sample; guidance acts in the middle half of the steps."""
        return sum(steps * (1 + 0.5 * (scale != 1)) for steps, scale in zip(self.steps, self.guidance))

    def __str__(self) -> str:
        guidance = "/".join(f"{scale:g}" for scale in self.guidance)
        text = f"{self.source}, {'/'.join(map(str, self.steps))} steps, guidance {guidance}"
        text += f", noise level {self.noise_level:g}" if self.noise_level is not None else ""
        return text + (f", {self.solver}" if self.solver != "UniPC" else "")


def settings(name: str, variant: Variant) -> list[Setting]:
    """How a model is sampled: with as many evaluations as class-only in 24 steps, the code model's included.

    What was tried is sampled briefly, with Euler's method.
    """
    if variant.recipe.prior_drop == 1:
        found = [Setting("stage", (24,), (scale,)) for scale in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)]
        return [replace(found[0], solver="Euler"), *found]
    if variant.code_size is None:
        pairs = [(1.0, 1.0), (1.5, 1.0), (1.5, 1.25), (1.5, 1.5), (2.0, 1.25), (2.0, 2.0), (3.0, 2.0), (3.0, 3.0)]
        found = [Setting("stage", (12, 12), pair) for pair in pairs]
        return [replace(found[0], solver="Euler"), *found, Setting("real", (20,), (1.0,))]
    if name in OPTIONS:
        tried = (("codes", 1.0), ("codes", 1.5), ("real", 1.0))
        found = [Setting(source, (12,), (scale,), solver="Euler") for source, scale in tried]
    else:
        found = [Setting("codes", (20,), (scale,)) for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)]
        found += [Setting("codes", (12,), (scale,)) for scale in (1.0, 2.0)]
        found += [Setting("codes", (10, 10), (1.5, 1.5)), Setting("real", (20,), (1.0,))]
        found = [replace(found[0], solver="Euler"), *found]
    levels = variant.noise_levels if variant.reads_noise_level else (None,)
    return [replace(setting, noise_level=level) for level in levels for setting in found]

"""What a trained pipeline of the study makes, and how far that is from real images."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from autoguidance import guided_by
from data_sets import DataSet
from referee import Referee

from diffusers_dod import DoDPipeline
from diffusers_dod.evaluation import feature_statistics, frechet_distance


# Guidance acts in the middle half of the steps by default, as in DoDPipeline.
MIDDLE = (0.25, 0.75)


@dataclass(frozen=True)
class Setting:
    """How to sample: one entry per stage.

    Args:
        steps (`tuple` of `int`): denoising steps.
        guidance (`tuple` of `float`): class guidance, 1 for none.
        prior_guidance (`float`, *optional*): guidance by the prior in the later stages, at the cost of a third row.
        intervals (`tuple` of pairs, *optional*): the guided part of each stage's steps.
        drop (`str`): what the guiding row goes without, `"class"` or `"both"` class and prior.
        autoguidance (`bool`): the guiding row is the prediction of the run's first checkpoint.
        real_prior (`bool`): real training images take stage 1's place.
    """

    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    prior_guidance: float | None = None
    intervals: tuple[tuple[float, float], ...] | None = None
    drop: str = "class"
    autoguidance: bool = False
    real_prior: bool = False

    def evaluations(self, stage: int) -> float:
        """Rows that the transformer computes for one sample of a stage, all stages before it included."""
        total = 0.0
        for number in range(2 if self.real_prior else 1, stage + 1):
            steps, guidance = self.steps[number - 1], self.guidance[number - 1]
            rows = 1
            if number > 1 and self.prior_guidance is not None:
                rows = 3
            elif guidance != 1:
                rows = 2
            start, stop = self.intervals[number - 1] if self.intervals else MIDDLE
            total += steps * (1 + (rows - 1) * (stop - start))
        return total

    def __str__(self) -> str:
        guidance = "/".join(f"{scale:g}" for scale in self.guidance)
        text = f"{'/'.join(map(str, self.steps))} steps, guidance {guidance}"
        if self.prior_guidance is not None:
            text += f", prior guidance {self.prior_guidance:g}"
        if self.intervals:
            text += ", interval " + "/".join(f"{start:g}-{stop:g}" for start, stop in self.intervals)
        if self.drop != "class":
            text += ", against neither class nor prior"
        if self.autoguidance:
            text += ", autoguidance"
        return text + (", real prior" if self.real_prior else "")


def unguided(*steps: int, **options) -> Setting:
    return Setting(steps, (1.0,) * len(steps), **options)


def sample_labels(data: DataSet, number: int) -> torch.Tensor:
    """Classes as often as the training images have them, mixed evenly: `(number,)`."""
    shares = torch.bincount(data.labels.cpu()) * number / len(data.labels)
    counts = shares.long()
    counts[(shares - counts).argsort(descending=True)[: number - int(counts.sum())]] += 1
    places = torch.cat([torch.arange(count) / count for count in counts])
    return torch.arange(len(counts)).repeat_interleave(counts)[places.argsort(stable=True)].to(data.labels.device)


def sample(pipe: DoDPipeline, setting: Setting, labels: torch.Tensor, data: DataSet, seed: int) -> list[torch.Tensor]:
    """The images of every stage that ran, `(labels, channels, size, size)` in [-1, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    # Neighbours of a data set's images have much in common, such as their typeface.
    shuffled = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    batches = []
    for start in range(0, len(labels), 250):
        batch = labels[start : start + 250]
        first = None
        if setting.real_prior:
            # The n-th sample of a class has the n-th training image of it, in this order, as its prior.
            numbers = [int((labels[:place] == label).sum()) for place, label in enumerate(batch, start=start)]
            of_class = {int(label): shuffled[data.labels[shuffled] == label] for label in batch.unique()}
            first = data.images[torch.stack([of_class[int(label)][n] for label, n in zip(batch, numbers)])]
        output = pipe(
            batch,
            image=first,
            num_stages=len(setting.steps),
            num_inference_steps=list(setting.steps),
            guidance_scale=list(setting.guidance),
            prior_guidance_scale=setting.prior_guidance,
            guidance_interval=list(setting.intervals) if setting.intervals else MIDDLE,
            guidance_drop=setting.drop,
            generator=generator,
            output_type="latent",
            return_stages=True,
        )
        batches.append(output.stages)
    return [torch.cat(stage).clamp(-1, 1) for stage in zip(*batches)]


def root_mean_square(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


def nearest(images: torch.Tensor, others: torch.Tensor) -> float:
    """Median root mean square distance of an image to the nearest of others."""
    distances = torch.cdist(images.flatten(1), others.flatten(1)).min(dim=1).values
    return (distances.median() / images[0].numel() ** 0.5).item()


@torch.no_grad()
def explain(pipe: DoDPipeline, stages: list[torch.Tensor], data: DataSet) -> dict[str, float]:
    """Why stage 2 is what it is: how near the codes of stage 1 are to those of real images, and who copies whom.

    Returns:
        `dict`: `code_fd`, the Fréchet distance of stage 1's codes to real images' over the variance of these;
        `stage_2_to_1`, root mean square difference; `nearest_training` of stage 2 and of held-out images.
    """
    embedder = pipe.latent_embedder
    real = embedder(data.images[torch.randperm(len(data.images))[:4000]]).codes.flatten(1)
    generated = embedder(stages[0]).codes.flatten(1)
    distance = frechet_distance(feature_statistics(generated), feature_statistics(real))
    held_out = data.held_out_images[torch.randperm(len(data.held_out_images))[: len(stages[0])]]
    return {
        "code_fd": distance / real.var(dim=0).sum().item(),
        "stage_2_to_1": root_mean_square(stages[1] - stages[0]),
        "nearest_training": nearest(stages[1], data.images),
        "nearest_training_held_out": nearest(held_out, data.images),
    }


def measure(
    pipe: DoDPipeline,
    weak: DoDPipeline,
    settings: list[Setting],
    num_samples: int,
    data: DataSet,
    referee: Referee,
    seed: int,
) -> list[dict]:
    """A row of figures for every stage of every setting; `weak` is what autoguidance is by."""
    labels = sample_labels(data, num_samples)
    rows = []
    for setting in settings:
        with guided_by(pipe, weak) if setting.autoguidance else nullcontext():
            stages = sample(pipe, setting, labels, data, seed)
        first_stage = 2 if setting.real_prior else 1
        for stage, images in enumerate(stages, start=first_stage):
            evaluations = setting.evaluations(stage)
            rows.append({"setting": str(setting), "stage": stage, "evaluations": evaluations})
            rows[-1] |= referee.measure(images, labels)
            if setting == unguided(*setting.steps) and stage == 2:
                rows[-1] |= explain(pipe, stages, data)
    return rows

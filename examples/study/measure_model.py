"""What a trained pipeline of the study makes, and how far that is from real images."""

from dataclasses import dataclass

import torch
from data_sets import DataSet
from referee import Referee

from diffusers_dod import DoDPipeline
from diffusers_dod.evaluation import feature_statistics, frechet_distance


# Guidance acts in the middle half of the steps, which is DoDPipeline's default.
GUIDED_SHARE = 0.5


@dataclass(frozen=True)
class Setting:
    """How to sample: one entry a stage.

    Args:
        steps (`tuple` of `int`): denoising steps.
        guidance (`tuple` of `float`): class guidance, 1 for none.
        prior_guidance (`float`, *optional*): guidance by the prior in the later stages, at the cost of a third row.
        prior_noise (`float`): noise that the embedder's input gets, `(1 - s) x + s noise`.
        real_prior (`bool`): real training images take stage 1's place.
    """

    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    prior_guidance: float | None = None
    prior_noise: float = 0.0
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
            total += steps * (1 + (rows - 1) * GUIDED_SHARE)
        return total

    def __str__(self) -> str:
        guidance = "/".join(f"{scale:g}" for scale in self.guidance)
        text = f"{'/'.join(map(str, self.steps))} steps, guidance {guidance}"
        if self.prior_guidance is not None:
            text += f", prior guidance {self.prior_guidance:g}"
        if self.prior_noise:
            text += f", prior noise {self.prior_noise:g}"
        return text + (", real prior" if self.real_prior else "")


def unguided(*steps: int, **options) -> Setting:
    return Setting(steps, (1.0,) * len(steps), **options)


def sample(pipe: DoDPipeline, setting: Setting, labels: torch.Tensor, data: DataSet, seed: int) -> list[torch.Tensor]:
    """The images of every stage that ran, `(labels, channels, size, size)` in [-1, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, len(labels), 250):
        batch = labels[start : start + 250]
        options = {"generator": generator, "output_type": "latent", "return_stages": True}
        first = None
        if setting.real_prior:
            # The n-th sample of a class has the n-th training image of it as its prior.
            numbers = torch.arange(start, start + len(batch)) // len(data.class_names)
            first = torch.stack([data.images[data.labels == label][n] for label, n in zip(batch, numbers)])
        elif setting.prior_noise:
            first = pipe(batch, 1, setting.steps[0], setting.guidance[0], **options).images
        if first is not None:
            noise = torch.randn(first.shape, generator=generator).to(first.device)
            options["image"] = (1 - setting.prior_noise) * first + setting.prior_noise * noise
        stages = pipe(
            batch,
            num_stages=len(setting.steps),
            num_inference_steps=list(setting.steps),
            guidance_scale=list(setting.guidance),
            prior_guidance_scale=setting.prior_guidance,
            **options,
        ).stages
        batches.append(stages if setting.real_prior or first is None else [first, *stages])
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
    pipe: DoDPipeline, settings: list[Setting], num_samples: int, data: DataSet, referee: Referee, seed: int
) -> list[dict]:
    """A row of figures for every stage of every setting."""
    labels = torch.arange(num_samples, device=data.images.device) % len(data.class_names)
    rows = []
    for setting in settings:
        stages = sample(pipe, setting, labels, data, seed)
        first_stage = 2 if setting.real_prior else 1
        for stage, images in enumerate(stages, start=first_stage):
            evaluations = setting.evaluations(stage)
            rows.append({"setting": str(setting), "stage": stage, "evaluations": evaluations})
            rows[-1] |= referee.measure(images, labels)
            if setting == unguided(*setting.steps) and stage == 2:
                rows[-1] |= explain(pipe, stages, data)
    return rows

"""Training of the study's models: backbone with or without an embedder, and models of codes, by one step.

On a GPU a step is captured as a CUDA graph, so that many small models train side by side on one device.
"""

import math
from dataclasses import dataclass

import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.training import dod_loss, drop_labels, flow_example


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        steps (`int`): training steps.
        batch_size (`int`): images per step, drawn at random.
        learning_rate (`float`): at its highest; it rises for 3 % of the steps and falls to 0 along a cosine.
        logit_mean (`float`): noise levels are `sigmoid(logit_mean + normal)`.
        class_drop (`float`): share of rows without a class.
        prior_drop (`float`): share of rows without a prior; 1 has no embedder.
        code_noise (`float` or pair of `float`):
            noise on the codes, in multiples of their root mean square; a pair is a range, of which the embedder is told
            each row's level.
        near_noise (`float`): share of the rows with a prior whose sigma is uniform in [0.9, 1].
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    logit_mean: float = 0.4
    class_drop: float = 0.1
    prior_drop: float = 1.0
    code_noise: float | tuple[float, float] = 0.0
    near_noise: float = 0.0


class Training:
    """One training run: `step()` takes the next step, `finish()` leaves the averaged weights in the models.

    Args:
        transformer ([`DoDTransformer2DModel`]): trained.
        embedder ([`DoDLatentEmbedder`], *optional*): trained with it.
        images (`torch.Tensor`): `(number, channels, size, size)`; normalised codes for a model of codes.
        labels (`torch.Tensor`): `(number,)`.
        recipe (`Recipe`): recipe of the run.
        seed (`int`): seed of the run.
    """

    # The average's memory is a tenth of the steps so far (EDM2's power function).
    AVERAGE_SHARE = 0.1
    WARM_UP = 3  # eager steps before a graph is captured

    def __init__(
        self,
        transformer: DoDTransformer2DModel,
        embedder: DoDLatentEmbedder | None,
        images: torch.Tensor,
        labels: torch.Tensor,
        recipe: Recipe,
        seed: int,
    ):
        device = images.device
        self.transformer, self.embedder = transformer.to(device), None if embedder is None else embedder.to(device)
        self.images, self.labels, self.recipe = images, labels, recipe
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_prior_rows = 0 if embedder is None else round(recipe.batch_size * (1 - recipe.prior_drop))
        self.parameters = [p for m in (transformer, embedder) if m is not None for p in m.parameters()]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.learning_rate, self.memory = torch.zeros((), device=device), torch.zeros((), device=device)
        options = {"capturable": True} if images.is_cuda else {}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, **options
        )
        self.steps_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if images.is_cuda else None

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.images.device, generator=self.generator)

    def loss(self) -> torch.Tensor:
        """The loss of a random batch."""
        recipe, device, count = self.recipe, self.images.device, self.recipe.batch_size
        rows = torch.randint(len(self.images), (count,), device=device, generator=self.generator)
        images = self.images[rows]
        draws = torch.rand(count, device=device, generator=self.generator)
        labels = drop_labels(self.labels[rows], self.transformer.config.num_classes, recipe.class_drop, draws=draws)
        sigmas = torch.sigmoid(recipe.logit_mean + self._normal(count))
        if recipe.near_noise:
            uniform = torch.rand(2, count, device=device, generator=self.generator)
            with_prior = torch.arange(count, device=device) < self.num_prior_rows
            sigmas = torch.where(with_prior & (uniform[0] < recipe.near_noise), 0.9 + 0.1 * uniform[1], sigmas)
        example = flow_example(images, self._normal(*images.shape), sigmas)
        code_noise, noise_level = None, None
        if recipe.code_noise and self.embedder is not None:
            grid = self.embedder.code_grid(*images.shape[-2:])
            code_noise = self._normal(count, math.prod(grid), self.embedder.config.bottleneck_dim)
            if isinstance(recipe.code_noise, tuple):
                low, high = recipe.code_noise
                noise_level = low + (high - low) * torch.rand(count, device=device, generator=self.generator)
            else:
                code_noise = recipe.code_noise * code_noise
        options = {"code_noise": code_noise, "noise_level": noise_level}
        return dod_loss(self.transformer, self.embedder, images, labels, example, self.num_prior_rows, **options).total

    def _update(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            moved = torch._foreach_mul([p.detach() for p in self.parameters], 1 - self.memory)
            torch._foreach_mul_(self.averages, self.memory)
            torch._foreach_add_(self.averages, moved)

    def _schedule(self) -> None:
        step, warm_up = self.steps_done, max(1, round(0.03 * self.recipe.steps))
        rate = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps))
        self.learning_rate.fill_(self.recipe.learning_rate * rate)
        self.memory.fill_(1 - 1 / (1 + self.AVERAGE_SHARE * step))

    @property
    def is_done(self) -> bool:
        return self.steps_done >= self.recipe.steps

    def step(self) -> None:
        """The next step; on a GPU on a stream of its own, as a graph after the first few."""
        if self.stream is None:
            self._schedule()
            self._update()
        else:
            with torch.cuda.stream(self.stream):
                self._schedule()
                if self.graph is None:
                    self._update()
                else:
                    self.graph.replay()
        self.steps_done += 1

    def capture(self) -> None:
        """Captures the step, after some eager ones; for a GPU."""
        self.stream.wait_stream(torch.cuda.current_stream())
        for _ in range(self.WARM_UP):
            self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=self.stream):
            self._update()
        self.graph = graph

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the averaged weights into the models."""
        torch._foreach_copy_(self.parameters, self.averages)
        for model in (self.transformer, self.embedder):
            if model is not None:
                model.eval().requires_grad_(False)


def train_together(trainings: list[Training]) -> None:
    """Runs all to their end: one after the other on a CPU, side by side on a GPU."""
    if trainings[0].images.is_cuda:
        for training in trainings:
            training.capture()
        while running := [training for training in trainings if not training.is_done]:
            for training in running:
                training.step()
        torch.cuda.synchronize()
    else:
        for training in trainings:
            while not training.is_done:
                training.step()
    for training in trainings:
        training.graph = None
        training.finish()

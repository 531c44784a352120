"""Which image each row of each step trains on: a function of the position in the training alone.

A run can thus start at any step without replaying those before, and any number of processes shares the same batches.
"""

from collections.abc import Iterator, Sequence

import torch

from ..randomness import step_generator


class EpochOrder:
    """Indices of the images, epoch after epoch without end, each epoch in an order of its own.

    Args:
        num_images (`int`): images of an epoch.
        seed (`int`): of the orders.
        labels (sequence of `int`, *optional*):
            classes of the images, for balanced sampling: all classes then come equally often, whatever their sizes. An
            epoch holds as many images as a plain one, which repeats those of small classes and leaves out some of large
            ones, others each time.
    """

    def __init__(self, num_images: int, seed: int, labels: Sequence[int] | None = None):
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, torch.empty(0)
        self._members: tuple[torch.Tensor, ...] | None = None
        if labels is not None:
            classes = torch.as_tensor(labels)
            by_class = classes.argsort(stable=True)
            self._members = by_class.split(classes.bincount()[classes.unique()].tolist())

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        generator = step_generator(self.seed, epoch)
        if self._members is None:
            return torch.randperm(self.num_images, generator=generator)
        # Classes take turns, in an order of their own for what does not divide; each fills its turns from its images.
        num_classes = len(self._members)
        turns = torch.randperm(num_classes, generator=generator)[torch.arange(self.num_images) % num_classes]
        chosen: list[torch.Tensor] = []
        for members, count in zip(self._members, turns.bincount(minlength=num_classes).tolist()):
            rounds = -(-count // len(members))
            orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            chosen.extend(members[order] for order in [torch.cat(orders)[:count]] if count)
        return torch.cat(chosen)[torch.randperm(self.num_images, generator=generator)]

    def __getitem__(self, position: int) -> int:
        """The index of the image at a position of the training, from 0 without end."""
        epoch, within = divmod(position, self.num_images)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return int(self._order[within])


class BatchSampler:
    """The batches of one process from a step on, without end; a `batch_sampler` for `DataLoader`.

    The global batch of a step is dealt like cards: with `shares = num_processes * accumulation_steps`, share `k` gets
    positions `k`, `k + shares`, `k + 2 * shares` and so on. Share `micro_step * num_processes + process` is what a process
    trains on in one of its micro steps. The first rows of the global batch are so the first rows of every share.

    Args:
        order ([`EpochOrder`]): of the images.
        batch_size (`int`): rows of a share.
        num_processes (`int`): processes of the run.
        process_index (`int`): index of this one.
        accumulation_steps (`int`): micro steps of a step.
        first_step (`int`): steps already done.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation_steps: int = 1,
        first_step: int = 0,
    ):
        self.order, self.batch_size, self.first_step = order, batch_size, first_step
        self.num_processes, self.process_index = num_processes, process_index
        self.accumulation_steps = accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        shares = self.num_processes * self.accumulation_steps
        step = self.first_step
        while True:
            for micro_step in range(self.accumulation_steps):
                share = micro_step * self.num_processes + self.process_index
                first = step * shares * self.batch_size + share
                yield [self.order[first + row * shares] for row in range(self.batch_size)]
            step += 1

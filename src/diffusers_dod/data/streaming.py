"""Training on a `datasets.IterableDataset`: shuffled in blocks, endless, and resumed exactly."""

import inspect
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import torch

from ..randomness import step_generator


class ShuffledStream:
    """Batches of undecoded rows, epoch after epoch without end, each with the state that leads to the next one.

    `datasets`' own shuffle buffer is lost on resuming. Here the stream is read in blocks of `buffer_size` rows, each
    permuted by itself; the state is `datasets`' state at the start of a block and the rows used of it, so resuming reads
    one block again. Every block is read by an iterator that starts from such a state, so that a resumed run and an
    unbroken one do the same. The next block is read in a thread meanwhile.

    To decode in the workers of a `DataLoader`, pass this as its `sampler` with `batch_size=None` and [`StreamedRows`] as
    its dataset: the rows then travel as if they were indices, and the order is that of one process.

    Args:
        data (`datasets.IterableDataset`): the part of this process (`datasets.distributed.split_dataset_by_node`).
        batch_size (`int`): rows of a batch.
        buffer_size (`int`): rows of a block.
        seed (`int`): of the order of the shards, which changes each epoch, and of the rows in a block.
        state (`str`, *optional*): to resume from.
    """

    def __init__(
        self, data: datasets.IterableDataset, batch_size: int, buffer_size: int, seed: int, state: str | None = None
    ):
        self.data, self.batch_size, self.buffer_size, self.seed, self.state = (
            data,
            batch_size,
            buffer_size,
            seed,
            state,
        )

    def _read_block(self, epoch: int, start: dict | None) -> tuple[list[dict], dict]:
        """Its rows, and the state in which the next one starts."""
        shard_seed = torch.randint(2**31, (), generator=step_generator(self.seed, epoch)).item()
        # A buffer of one row: only the shards are shuffled here. Since version 5, `datasets` would read several at once, in
        # threads that take seconds to stop at the end of a block.
        options = {"seed": shard_seed, "buffer_size": 1, "max_buffer_input_shards": 1}
        known = inspect.signature(self.data.shuffle).parameters
        data = self.data.shuffle(**{name: value for name, value in options.items() if name in known})
        if start is not None:
            data.load_state_dict(start)
        return list(itertools.islice(data, self.buffer_size)), json.loads(json.dumps(data.state_dict()))

    def __iter__(self) -> Iterator[tuple[list[dict], str]]:
        state: dict[str, Any] = (
            {"epoch": 0, "block": 0, "start": None, "used": 0} if self.state is None else json.loads(self.state)
        )
        rows = []
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(self._read_block, state["epoch"], state["start"])
            while True:
                block, end = reading.result()
                if not block and state["block"] == 0:
                    raise ValueError("the stream holds no images for this process")
                if block:
                    following: dict[str, Any] = {
                        "epoch": state["epoch"],
                        "block": state["block"] + 1,
                        "start": end,
                        "used": 0,
                    }
                else:
                    following = {"epoch": state["epoch"] + 1, "block": 0, "start": None, "used": 0}
                reading = reader.submit(self._read_block, following["epoch"], following["start"])

                # Batches may reach into the next block.
                generator = step_generator(self.seed, state["epoch"] << 32 | 1 + state["block"])
                order = torch.randperm(len(block), generator=generator).tolist()
                for used in range(state["used"], len(block)):
                    rows.append(block[order[used]])
                    if len(rows) == self.batch_size:
                        yield rows, json.dumps({**state, "used": used + 1})
                        rows = []
                state = following


class StreamedRows(torch.utils.data.Dataset):
    """The dataset beside a [`ShuffledStream`]: its indices are its items."""

    def __getitem__(self, item: tuple[list[dict], str]) -> tuple[list[dict], str]:
        return item

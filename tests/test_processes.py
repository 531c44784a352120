"""Two real processes end their process group many times over."""

import multiprocessing

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from diffusers_dod.processes import drain_process_group, end_together


ROUNDS = 20


def train_and_end(rank, folder, number):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(50, 50))
    model(torch.randn(4, 50)).sum().backward()
    total = torch.ones(3)
    dist.all_reduce(total)
    drain_process_group()
    dist.destroy_process_group()
    # The model, which holds the group, goes here.


def rounds(rank, folder):
    torch.set_num_threads(1)
    for number in range(ROUNDS):
        train_and_end(rank, folder, number)


def test_two_processes_end_every_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=rounds, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_one_process_has_nothing_to_wait_for():
    drain_process_group()
    end_together(Accelerator())

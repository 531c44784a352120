"""Two processes that share the tokens, or the weights, sample what one process does."""

import parallel_sampling
import pytest
import torch
from helpers import process_context
from parallel_sampling import BACKBONES, WORLD_SIZE, share_tokens, share_weights

from diffusers_dod import DoDTransformer2DModel


SHARES = [share_tokens] + [share_weights] * (DoDTransformer2DModel._tp_plan is not None)
needs_tensor_parallel = pytest.mark.skipif(
    DoDTransformer2DModel._tp_plan is None, reason="tensor parallelism came with diffusers 0.40"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    context = process_context()
    processes = [
        context.Process(target=parallel_sampling.run, args=(rank, str(folder), SHARES)) for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * WORLD_SIZE
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "share, shape",
    # 16 tokens of width 16 are 8 tokens, or 2 of 4 heads
    [(share_tokens, (8, 16)), pytest.param(share_weights, (16, 8), marks=needs_tensor_parallel)],
    ids=["context", "tensor"],
)
def test_two_processes_sample_as_one(share, shape, backbone, results):
    expected, whole = parallel_sampling.sample(backbone)
    assert whole == (16, 16)
    for result in results:
        stages, seen = result[share.__name__, backbone]
        assert seen == shape
        torch.testing.assert_close(stages, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

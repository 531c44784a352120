"""The guard, the averages, and the count of operations."""

import math
import os
import signal

import pytest
import torch
from helpers import tiny_embedder, tiny_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dod.training.averaging import WeightAverages, fill_tensors
from diffusers_dod.training.flops import embedder_flops, training_flops, transformer_flops
from diffusers_dod.training.guard import StepGuard
from diffusers_dod.training.stopping import StopRequest


def test_the_guard_skips_what_is_not_finite_and_counts():
    guard = StepGuard(max_skipped=2)
    assert guard.reason_to_skip(1.0, 1.0) is None
    assert "loss is nan" in guard.reason_to_skip(math.nan, 1.0)
    assert "gradient norm is inf" in guard.reason_to_skip(1.0, math.inf)
    assert not guard.exhausted
    assert guard.reason_to_skip(1.0, 1e9) is None  # spikes are not looked for
    for _ in range(3):
        assert guard.reason_to_skip(math.nan, math.nan) is not None
    assert guard.exhausted and guard.skipped == 5


def test_the_guard_skips_spikes_above_the_running_mean_also_after_a_resume():
    guard = StepGuard(spike_factor=3.0, warmup=10)
    for _ in range(9):
        assert guard.reason_to_skip(1.0, 2.0) is None
    assert guard.reason_to_skip(1.0, 20.0) is None  # still warming up
    resumed = StepGuard(spike_factor=3.0, warmup=10)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.mean == pytest.approx(3.8)
    assert "after 3.8 on average" in resumed.reason_to_skip(1.0, 11.5)
    assert resumed.mean == pytest.approx(3.8)  # a spike does not raise it
    assert resumed.reason_to_skip(1.0, 11.3) is None


def test_averages_of_several_decays_follow_their_recursion():
    parameter = torch.nn.Parameter(torch.zeros(3))
    averages = WeightAverages({"weight": parameter}, [0.15, 0.5])
    expected = {0.15: torch.zeros(3), 0.5: torch.zeros(3)}
    for step in range(1, 8):
        with torch.no_grad():
            parameter.copy_(torch.full((3,), float(step**2)))
        averages.step()
        for decay in expected:
            # diffusers' ramp: the first step takes the weights themselves
            ramp = 0.0 if step == 1 else min(decay, step / (9 + step))
            expected[decay] = ramp * expected[decay] + (1 - ramp) * parameter.detach()
    for decay, value in expected.items():
        torch.testing.assert_close(averages.tensors(decay)["weight"], value)
    assert not torch.allclose(expected[0.15], expected[0.5])


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="do not fit, for instance b"):
        fill_tensors({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})


@pytest.mark.parametrize("size", [8, (4, 16)])
def test_the_formulas_count_what_torch_counts(size):
    transformer = tiny_transformer(num_layers=3, out_channels=8, adaln_rank=3)
    embedder = tiny_embedder(patch_size=4, output_patch_size=2, num_encoder_layers=2)
    latents = torch.randn(1, 4, *((size, size) if isinstance(size, int) else size))
    # torch's counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(latents, torch.tensor([500.0]), torch.tensor([1]))
    assert transformer_flops(transformer, size) == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embedder(latents)
    assert embedder_flops(embedder, size) == counter.get_total_flops()
    expected = 3 * (transformer_flops(transformer, 8) + 0.5 * embedder_flops(embedder, 8))
    assert training_flops(transformer, embedder, prior_share=0.5) == expected


def test_a_stop_request_notes_a_signal_and_gives_the_handlers_back():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the next one ends it
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before

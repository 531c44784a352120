"""diffusers' feature caches on the transformer: what they skip is really not computed, and a reset forgets it."""

import diffusers
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from helpers import tiny_transformer


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0, 500.0]),
        "class_labels": torch.tensor([3, 10]),
        "encoder_hidden_states": torch.randn(2, 16, 16, generator=generator),
    }


def first_block():
    return FirstBlockCacheConfig(threshold=100.0)


def mag():
    return diffusers.MagCacheConfig(threshold=100.0, num_inference_steps=4, retention_ratio=0.0, mag_ratios=[1.0] * 4)


def taylor_seer():
    return TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=1, max_order=1)


def pyramid():
    return PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)


# What the second of two steps runs: calls of the attention's and the feed-forward's projections in the 3 blocks
CACHES = [(first_block, 1, 1), (taylor_seer, 0, 3), (pyramid, 0, 3), (mag, 0, 0)]


def count_calls(model):
    calls = {"attention": 0, "feed_forward": 0}

    def counter(key):
        def count(*_):
            calls[key] += 1

        return count

    for block in model.transformer_blocks:
        block.attn.to_q.register_forward_hook(counter("attention"))
        block.ff.net[2].register_forward_hook(counter("feed_forward"))
    return calls


@pytest.mark.parametrize(("make_config", "attention_calls", "feed_forward_calls"), CACHES)
@torch.no_grad()
def test_cache_skips(make_config, attention_calls, feed_forward_calls):
    model = tiny_transformer(num_layers=3)
    plain = [model(**make_inputs(seed)).sample for seed in (0, 1)]
    calls = count_calls(model)
    model.enable_cache(make_config())
    assert model.is_cache_enabled

    with model.cache_context("test"):
        first = model(**make_inputs(0)).sample
        assert calls == {"attention": 3, "feed_forward": 3}
        calls.update(attention=0, feed_forward=0)
        second = model(**make_inputs(1)).sample
    assert calls == {"attention": attention_calls, "feed_forward": feed_forward_calls}
    torch.testing.assert_close(first, plain[0])
    assert second.isfinite().all() and (second - plain[1]).abs().max() > 1e-3

    # A new stage: nothing of the one before is left
    model._reset_stateful_cache()
    with model.cache_context("test"):
        torch.testing.assert_close(model(**make_inputs(1)).sample, plain[1])

    model.disable_cache()
    calls.update(attention=0, feed_forward=0)
    assert torch.equal(model(**make_inputs(1)).sample, plain[1])
    assert calls == {"attention": 3, "feed_forward": 3}


@pytest.mark.parametrize("make_config", [make_config for make_config, *_ in CACHES])
@torch.no_grad()
def test_caches_of_a_model_with_class_tokens(make_config):
    """Those that subtract the first block's tokens from the last one's are refused; those of attention skip it."""
    model = tiny_transformer(num_layers=3, in_context_len=3, in_context_start=1)
    if make_config in (first_block, mag):
        with pytest.raises(ValueError, match=f"{type(make_config()).__name__} subtracts.*use a cache of attention"):
            model.enable_cache(make_config())
        assert not model.is_cache_enabled
        return
    model.enable_cache(make_config())
    calls = count_calls(model)
    with model.cache_context("test"):
        model(**make_inputs(0))
        assert calls == {"attention": 3, "feed_forward": 3}
        assert model(**make_inputs(1)).sample.isfinite().all()
    assert calls == {"attention": 3, "feed_forward": 6}


@torch.no_grad()
def test_faster_cache_skips_attention():
    model = tiny_transformer(num_layers=3)
    calls, timestep = count_calls(model), [900]
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: timestep[0],
    )
    model.enable_cache(config)
    model(**make_inputs(0))
    assert calls == {"attention": 3, "feed_forward": 3}
    timestep[0] = 500
    assert model(**make_inputs(1)).sample.isfinite().all()
    assert calls == {"attention": 3, "feed_forward": 6}


def test_faster_cache_may_not_halve_the_batch():
    config = FasterCacheConfig(tensor_format="BCHW", current_timestep_callback=lambda: 500)
    with pytest.raises(ValueError, match="class_labels.*is_guidance_distilled=True"):
        tiny_transformer().enable_cache(config)


@torch.no_grad()
def test_first_block_cache_follows_its_threshold():
    model = tiny_transformer(num_layers=3)
    plain = model(**make_inputs(1)).sample
    calls = count_calls(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("test"):
        model(**make_inputs(0))
        torch.testing.assert_close(model(**make_inputs(1)).sample, plain)
    assert calls == {"attention": 6, "feed_forward": 6}


@torch.no_grad()
def test_cache_contexts_do_not_mix():
    model = tiny_transformer(num_layers=3)
    model.enable_cache(first_block())
    plain = tiny_transformer(num_layers=3)(**make_inputs(1)).sample
    with model.cache_context("guided"):
        model(**make_inputs(0))
    with model.cache_context("unguided"):
        torch.testing.assert_close(model(**make_inputs(1)).sample, plain)

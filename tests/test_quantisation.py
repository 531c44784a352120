"""Quantised weights: loaded, sampled from, saved and loaded again, where the package is installed."""

import importlib.util

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from helpers import tiny_pipeline

from diffusers_dod import DoDPipeline


def torchao():
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto():
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def needs(name):
    return pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe([3, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.mark.parametrize(
    "config", [pytest.param(torchao, marks=needs("torchao")), pytest.param(quanto, marks=needs("optimum.quanto"))]
)
def test_a_quantised_pipeline_is_near_the_exact_one_and_survives_saving(config, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "exact")
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": config()})
    options = {"quantization_config": quantization, "torch_dtype": torch.float32}
    quantised = DoDPipeline.from_pretrained(tmp_path / "exact", **options)
    weight = quantised.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight) is not torch.nn.Parameter
    images, exact = sample(quantised), sample(pipe)
    change = (images - exact).abs().mean()
    assert 0 < change < 0.1 * exact.abs().mean()
    quantised.save_pretrained(tmp_path / "quantised")
    assert list((tmp_path / "quantised/transformer").glob("*.safetensors"))
    again = DoDPipeline.from_pretrained(tmp_path / "quantised", torch_dtype=torch.float32)
    assert type(again.transformer.transformer_blocks[0].attn.to_q.weight) is type(weight)
    assert torch.equal(sample(again), images)

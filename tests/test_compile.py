"""`torch.compile` of both models: no graph break, no recompilation between stages, the same numbers."""

import pytest
import torch
from helpers import tiny_embedder, tiny_transformer


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prior_tokens = torch.randn(2, 16, 16, generator=generator)
    return (latents, torch.tensor([100.0, 900.0]), torch.tensor([3, 10])), prior_tokens


@torch.no_grad()
def test_whole_transformer_and_embedder_in_one_graph_each():
    """With Inductor, the default backend: one graph for each stage, none for other values."""
    transformer, embedder = tiny_transformer(num_layers=1), tiny_embedder(patch_size=4, output_patch_size=2)
    inputs, _ = make_inputs()
    prior_tokens = embedder(inputs[0]).prior_tokens
    expected = [transformer(*inputs).sample, transformer(*inputs, prior_tokens).sample]

    compiled_embedder = torch.compile(embedder, fullgraph=True)
    compiled = torch.compile(transformer, fullgraph=True)
    torch.testing.assert_close(compiled_embedder(inputs[0]).prior_tokens, prior_tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compiled(*inputs).sample, expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compiled(*inputs, prior_tokens).sample, expected[1], atol=1e-4, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        later = (inputs[0] + 1, inputs[1] / 2, inputs[2] // 2)
        torch.testing.assert_close(
            compiled(*later, prior_tokens).sample, transformer(*later, prior_tokens).sample, atol=1e-4, rtol=1e-4
        )
        compiled_embedder(later[0])


# Dynamo and autograd as in the default backend, without Inductor's seconds of code generation
BACKEND = "aot_eager"


@torch.no_grad()
def test_repeated_blocks_compile_once_for_all_stages():
    transformer, embedder = tiny_transformer(num_layers=3), tiny_embedder(num_encoder_layers=2, num_decoder_layers=2)
    inputs, _ = make_inputs()
    prior_tokens = embedder(inputs[0]).prior_tokens
    expected = [transformer(*inputs).sample, transformer(*inputs, prior_tokens).sample]

    torch._dynamo.utils.counters.clear()
    transformer.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(transformer(*inputs).sample, expected[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(transformer(*inputs, prior_tokens).sample, expected[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    embedder.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(embedder(inputs[0]).prior_tokens, prior_tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_gradients():
    gradients = []
    for compiled in (False, True):
        transformer = tiny_transformer(num_layers=1)
        if compiled:
            transformer.compile(fullgraph=True, backend=BACKEND)
        inputs, prior_tokens = make_inputs()
        prior_tokens.requires_grad_()
        transformer(*inputs, prior_tokens).sample.square().mean().backward()
        gradients.append([prior_tokens.grad, *(parameter.grad for parameter in transformer.parameters())])
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dynamic_sizes_in_one_graph():
    transformer = tiny_transformer(num_layers=1)
    compiled = torch.compile(transformer, fullgraph=True, dynamic=True, backend=BACKEND)
    for i, (height, width) in enumerate([(8, 12), (16, 4), (12, 20)]):
        latents, timesteps, labels = torch.randn(2, 4, height, width), torch.tensor([1.0, 9.0]), torch.tensor([0, 1])
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            output = compiled(latents, timesteps, labels).sample
        torch.testing.assert_close(output, transformer(latents, timesteps, labels).sample, atol=1e-4, rtol=1e-4)

"""`torch.compile` of both models: no graph break, no recompilation between stages, the same numbers."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer

from diffusers_dod.training import dod_loss, flow_example


def _attention_can_be_traced() -> bool:
    """Whether Dynamo can trace diffusers' own attention dispatcher, which every model with it needs."""
    query = torch.randn(1, 4, 2, 8)
    try:
        torch.compile(dispatch_attention_fn, fullgraph=True, backend="eager")(query, query, query)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not _attention_can_be_traced(),
    reason="this torch cannot trace this diffusers' dispatch_attention_fn (0.36 with torch 2.6 and a new packaging)",
)


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


# Dynamo and autograd as in the default backend, without Inductor's seconds of code generation
BACKEND = "aot_eager"


@torch.no_grad()
def test_whole_models_in_one_graph_each():
    """One graph for each stage, and none for other values."""
    transformer, embedder = tiny_transformer(num_layers=1), tiny_embedder(patch_size=4, output_patch_size=2)
    inputs, _ = make_inputs()
    prior_tokens = embedder(inputs[0]).prior_tokens

    compiled_embedder = torch.compile(embedder, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled_embedder(inputs[0]).prior_tokens, prior_tokens)
    compiled = torch.compile(transformer, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(*inputs).sample, transformer(*inputs).sample)
    torch.testing.assert_close(compiled(*inputs, prior_tokens).sample, transformer(*inputs, prior_tokens).sample)
    with torch._dynamo.config.patch(error_on_recompile=True):
        later = (inputs[0] + 1, inputs[1] / 2, inputs[2] // 2, prior_tokens + 1)
        torch.testing.assert_close(compiled(*later).sample, transformer(*later).sample)
        compiled_embedder(later[0])


@torch.no_grad()
def test_one_graph_with_the_switches_of_dit():
    transformer = tiny_transformer(
        num_layers=1,
        pos_embed_type="sincos",
        activation_fn="gelu-approximate",
        qk_norm=None,
        adaln_type="full",
    )
    inputs, prior_tokens = make_inputs()
    compiled = torch.compile(transformer, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(*inputs, prior_tokens).sample, transformer(*inputs, prior_tokens).sample)


@torch.no_grad()
def test_repeated_blocks_compile_once_for_all_stages():
    """With Inductor, the backend that users have."""
    transformer, embedder = tiny_transformer(num_layers=3), tiny_embedder(num_encoder_layers=2, num_decoder_layers=2)
    inputs, _ = make_inputs()
    prior_tokens = embedder(inputs[0]).prior_tokens
    expected = [transformer(*inputs).sample, transformer(*inputs, prior_tokens).sample]

    torch._dynamo.utils.counters.clear()
    transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(transformer(*inputs).sample, expected[0], atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(transformer(*inputs, prior_tokens).sample, expected[1], atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    embedder.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(embedder(inputs[0]).prior_tokens, prior_tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_pipeline_draws_the_same_with_compiled_blocks():
    def draw():
        return pipe(
            [0, 1], num_stages=2, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt"
        ).images

    pipe = tiny_pipeline()
    expected = draw()
    for model in (pipe.transformer, pipe.latent_embedder):
        model.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(("dynamic", "first_batches"), [(None, [4, 8]), (True, [4])])
@torch.no_grad()
def test_batches_of_other_sizes_do_not_recompile_repeated_blocks(dynamic, first_batches):
    """Guided steps have twice the rows of others, and the last batch of a job fewer; sizes are dynamic from the second."""
    transformer, plain = tiny_transformer(num_layers=3), tiny_transformer(num_layers=3)
    all_prior_tokens = torch.randn(8, 16, 16)
    transformer.compile_repeated_blocks(fullgraph=True, backend=BACKEND, dynamic=dynamic)

    def check(rows, has_prior):
        inputs = (torch.randn(rows, 4, 8, 8), torch.full((rows,), 500.0), torch.arange(rows))
        prior_tokens = all_prior_tokens[:rows] if has_prior else None
        torch.testing.assert_close(transformer(*inputs, prior_tokens).sample, plain(*inputs, prior_tokens).sample)

    for rows in first_batches:
        check(rows, False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for has_prior in (True, False):
            for rows in (4, 8, 3, 6, 2):
                check(rows, has_prior)


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


def test_other_counts_of_rows_with_a_prior_do_not_recompile_a_training_step():
    """`count_prior_rows` rounds at random, so a step's embedder may see a row more or less. Dynamo alone decides."""
    transformer, embedder = tiny_transformer(num_layers=1), tiny_embedder()
    for model in (transformer, embedder):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    latents = torch.randn(8, 4, 8, 8)
    example = flow_example(latents, torch.randn_like(latents), torch.rand(8))

    def step(prior_rows):
        dod_loss(transformer, embedder, latents, torch.arange(8), example, prior_rows).total.backward()

    for prior_rows in (4, 3):  # sizes are dynamic from the second on
        step(prior_rows)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prior_rows in (5, 2, 0, 8):
            step(prior_rows)

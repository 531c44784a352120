"""What makes the models and the pipeline fast: the fast paths compute what the plain ones do, and only once."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import apply_rotary_emb
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dod.layers import rotary_embedding_2d, rotate, sincos_embedding_2d


CPU = torch.device("cpu")
SINCOS = {"pos_embed_type": "sincos", "base_size": 4}


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([100.0, 900.0]), torch.tensor([3, 10])


# --- rotary positions


@pytest.mark.parametrize(
    "dtype, table_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("fused", [False, True])
def test_rotation_is_diffusers_own(dtype, table_dtype, fused):
    """Also where queries and keys are slices of a fused projection, and where FSDP2 has cast the tables."""
    torch.manual_seed(0)
    projected = torch.randn(2, 12, 3 * 16, dtype=dtype).chunk(3, dim=-1)
    if not fused:
        projected = [part.contiguous() for part in projected]
    query, key = (part.unflatten(-1, (2, 8)) for part in projected[:2])
    tables = rotary_embedding_2d(3, 4, 8, 10000.0, CPU)
    tables = tuple(table.to(table_dtype) for table in tables)
    for turned, x in zip(rotate(query, key, tables), (query, key)):
        assert turned.dtype == dtype
        expected = apply_rotary_emb(x, tables, sequence_dim=1)
        torch.testing.assert_close(turned, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradient_of_the_rotation_is_diffusers_own():
    torch.manual_seed(0)
    tables = rotary_embedding_2d(3, 4, 8, 10000.0, CPU)
    query, key, weight = (torch.randn(2, 12, 2, 8, requires_grad=True) for _ in range(3))
    plain = [(apply_rotary_emb(x, tables, sequence_dim=1) * weight).sum() for x in (query, key)]
    fast = [(turned * weight).sum() for turned in rotate(query, key, tables)]
    for x, plain_sum, fast_sum in zip((query, key), plain, fast):
        (expected,) = torch.autograd.grad(plain_sum, x)
        (gradient,) = torch.autograd.grad(fast_sum, x)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


# --- tables of positions


def test_tables_are_made_once_a_grid_and_device():
    first = rotary_embedding_2d(5, 7, 8, 10000.0, CPU)
    assert rotary_embedding_2d(5, 7, 8, 10000.0, CPU) is first
    assert sincos_embedding_2d(5, 7, 16, 4, CPU) is sincos_embedding_2d(5, 7, 16, 4, CPU)
    others = [(7, 5, 8, 10000.0, CPU), (5, 7, 8, 100.0, CPU), (5, 7, 8, 10000.0, torch.device("meta"))]
    for arguments in others:
        assert rotary_embedding_2d(*arguments)[0] is not first[0]
    assert rotary_embedding_2d(*others[-1])[0].is_meta


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_a_second_forward_makes_no_table(overrides):
    """Whatever became of the model; the tables stay in float32."""
    model = tiny_transformer(**overrides)
    expected = model(*make_inputs()).sample
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_transformer(**overrides).to(dtype)
        with Operations() as operations:
            sample = model(make_inputs()[0].to(dtype), *make_inputs()[1:]).sample
        assert operations.names.count("aten.sin.default") == 1  # the timestep's
    assert torch.equal(sample, expected)


def test_tables_of_inference_mode_do_not_reach_training():
    """Where they would be saved for the backward pass, which autograd refuses."""
    arguments = (10, 6, 8, 10000.0, CPU)  # a grid that no other test has
    with torch.inference_mode():
        assert rotary_embedding_2d(*arguments)[0].is_inference()
    x = torch.randn(1, 60, 2, 8, requires_grad=True)
    apply_rotary_emb(x, rotary_embedding_2d(*arguments), sequence_dim=1).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_fake_tensors_leave_no_table_behind(overrides):
    model, latents = tiny_transformer(**overrides), torch.randn(2, 4, 14, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(2, 4, 14, 6), *(torch.empty_like(x) for x in make_inputs()[1:])).sample.shape[2] == 14
    assert type(model(latents, *make_inputs()[1:]).sample) is torch.Tensor
    with FakeTensorMode(allow_non_fake_inputs=True):  # nor do real tables get among them
        model(torch.empty(2, 4, 14, 6), *(torch.empty_like(x) for x in make_inputs()[1:]))


@pytest.mark.parametrize("overrides", [{}, SINCOS])
@torch.no_grad()
def test_exported_program_equals_the_model(overrides):
    """Traced by running the model, so tables must not come from what was kept, nor be kept."""
    model = tiny_transformer(num_layers=1, sample_size=12, **overrides)
    inputs = (torch.randn(2, 4, 12, 8), *make_inputs()[1:])
    program = torch.export.export(model, inputs, kwargs={"return_dict": False}, strict=False)
    expected = model(*inputs).sample
    torch.testing.assert_close(program.module()(*inputs, return_dict=False)[0], expected, atol=1e-5, rtol=1e-5)
    assert type(model(*inputs).sample) is torch.Tensor


# --- sampling


class Operations(TorchDispatchMode):
    """Remembers the names of all operations below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def count_operations(pipe, steps):
    with Operations() as operations:
        pipe([1, 3], num_inference_steps=steps, guidance_scale=2.0, guidance_interval=(0.0, 1.0), output_type="latent")
    return {name: operations.names.count(name) for name in set(operations.names)}


# Those after which the host reads what a device computed
WAITING = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.is_nonzero.default")


def test_steps_do_not_wait_for_the_device():
    """Neither the pipeline nor the models; nor FlowMatchEulerDiscreteScheduler, if it is told where to begin."""
    pipe = tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    count_operations(pipe, 2)  # makes the tables of positions
    few, many = count_operations(pipe, 2), count_operations(pipe, 5)
    assert many["aten.addmm.default"] > few["aten.addmm.default"]
    for name in WAITING:
        assert name not in many
    # Nor is anything copied to the device in each step.
    for name in ("aten._to_copy.default", "aten.lift_fresh.default"):
        assert many.get(name) == few.get(name)


@pytest.mark.parametrize("separate", [{}, {"prior_guidance_scale": 2.0}])
def test_conditions_are_put_together_once_a_stage(separate):
    pipe, labels, priors = tiny_pipeline(), [], []

    def watch(module, arguments, keywords):
        labels.append(keywords["class_labels"])
        priors.append(keywords["encoder_hidden_states"])

    pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    options = {"num_inference_steps": 6, "guidance_interval": (0.2, 0.8), "output_type": "latent"}
    pipe([1, 3], guidance_scale=2.0, **separate, **options)
    parts = 3 if separate else 2
    assert [len(rows) for rows in labels] == [2, 2, 4, 4, 4, 2] + [2, 2, *[2 * parts] * 3, 2]
    for stage in (0, 6):
        for kept in (labels, priors):
            assert len({id(tensor) for tensor in kept[stage : stage + 6]}) == (1 if kept[stage] is None else 2)


def test_a_prior_that_a_callback_changes_in_place_is_seen():
    pipe = tiny_pipeline()
    noise, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def change(in_place):
        def callback(pipe, step, timestep, tensors):
            tokens = tensors["prior_tokens"]
            return {"prior_tokens": tokens.zero_() if in_place else torch.zeros_like(tokens)}

        return callback

    def sample(callback):
        return pipe(
            [1, 3],
            image=picture,
            latents=noise,
            num_inference_steps=3,
            guidance_scale=2.0,
            guidance_interval=(0.0, 1.0),
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prior_tokens"],
        ).images

    assert torch.equal(sample(change(True)), sample(change(False)))
    assert (sample(change(False)) - sample(None)).abs().max() > 1e-3


# --- what a saved model holds


@pytest.mark.parametrize("build", [tiny_transformer, lambda: tiny_transformer(**SINCOS), tiny_embedder])
def test_tables_are_no_part_of_a_model(build):
    model = build()
    names, buffers = list(model.state_dict()), list(model.buffers())
    with torch.no_grad():
        model(*make_inputs()) if hasattr(model, "transformer_blocks") else model(make_inputs()[0])
    assert list(model.state_dict()) == names and list(model.buffers()) == buffers == []

"""What each of two processes does in `test_parallel.py`: samples with its share of the tokens or of the weights."""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from helpers import tiny_pipeline, tiny_transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module


# FiTv2's backbone, and DiT's
BACKBONES = {
    "rotary and SwiGLU": {"num_attention_heads": 4, "attention_head_dim": 4},
    "sine-cosine and GELU": {
        "num_attention_heads": 4,
        "attention_head_dim": 4,
        "pos_embed_type": "sincos",
        "base_size": 4,
        "activation_fn": "gelu-approximate",
        "qk_norm": None,
        "adaln_type": "full",
    },
}
WORLD_SIZE = 2


def share_tokens(model):
    """`enable_parallelism` without its look for an accelerator, of which it wants at least one."""
    context = ContextParallelConfig(ulysses_degree=WORLD_SIZE)
    config = ParallelConfig(context_parallel_config=context)
    mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config.setup(dist.get_rank(), WORLD_SIZE, torch.device("cpu"), mesh=mesh)
    for processor in model.attn_processors.values():
        processor._parallel_config = config
    apply_context_parallel(model, context, model._cp_plan)


def share_weights(model):
    """`apply_tensor_parallel` without its list of devices, which has no CPU."""
    from diffusers.hooks.tensor_parallel import _resolve_tp_plan, _styles, resolve_tp_shard_specs

    resolve_tp_shard_specs(model, model._tp_plan, WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("tp",))
    for module, plan in _resolve_tp_plan(model, model._tp_plan):
        parallelize_module(module, mesh, _styles(plan))


def sample(backbone, share=None):
    """Both stages' samples, and the shape of what the last block's attention saw as queries."""
    pipe = tiny_pipeline(transformer=tiny_transformer(**BACKBONES[backbone]))
    pipe.set_progress_bar_config(disable=True)
    if share is not None:
        share(pipe.transformer)
    shapes = []
    last = pipe.transformer.transformer_blocks[-1].attn.to_q
    last.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    arguments = {"num_inference_steps": 2, "guidance_interval": (0.0, 1.0), "output_type": "latent"}
    output = pipe([1, 3], generator=torch.Generator().manual_seed(0), return_stages=True, **arguments)
    return torch.stack(output.stages), shapes[-1]


def run(rank, folder, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    results = {(share.__name__, backbone): sample(backbone, share) for share in shares for backbone in BACKBONES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

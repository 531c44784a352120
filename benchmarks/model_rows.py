"""Rows of the models: against DiT, at full depth, with batch and tokens, compiled, in bfloat16."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from interleaved import Ratio, compare
from workloads import (
    backbone_step,
    compile_blocks,
    full_depth_factor,
    inputs,
    joint_step,
    make_dit,
    make_models,
    precision,
)


def training_rows(args) -> dict[str, Ratio]:
    """DoD-B/2 against diffusers' DiTTransformer2DModel of the same width, depth and multiply-accumulates."""
    transformer, embedder = make_models("B", args.layers, args.device)
    dit = make_dit(args.layers, args.device)
    if args.device == "cuda":
        compile_blocks(transformer, embedder, dit)
    their_step = backbone_step(dit, args.batch_size, args.device)
    rows = {
        "train step, backbone alone / DiT's": compare(
            backbone_step(transformer, args.batch_size, args.device), their_step, args.repeats
        ),
        "train step, embedder included / DiT's": compare(
            joint_step(transformer, embedder, args.batch_size, args.device), their_step, args.repeats
        ),
    }
    latents, timesteps, labels = inputs(args.batch_size, args.device)

    @torch.no_grad()
    def forward(model, timesteps):
        with precision(args.device):
            model(latents, timestep=timesteps, class_labels=labels)

    rows["forward / DiT's"] = compare(
        lambda: forward(transformer, timesteps), lambda: forward(dit, timesteps.long()), args.repeats
    )
    return rows


def depth_rows(args) -> dict[str, Ratio]:
    """The embedder beside a backbone of full depth, 30 guided steps per stage."""
    batch = 2 if args.device == "cpu" else args.batch_size
    transformer, embedder = make_models("B", None, args.device)
    their_step = backbone_step(make_dit(len(transformer.transformer_blocks), args.device), batch, args.device)
    rows = {
        f"train step, DoD-B/2 of full depth, embedder included, batch {batch} / DiT's": compare(
            joint_step(transformer, embedder, batch, args.device), their_step, args.repeats
        )
    }
    del their_step
    name = "embedder / 30 guided steps, DoD-B/2 of full depth (one is measured)"
    rows[name] = _embedder_share(transformer, embedder, args).times(30)
    del transformer, embedder

    layers = 3 if args.device == "cpu" else None
    transformer, embedder = make_models("XL", layers, args.device)
    share = _embedder_share(transformer, embedder, args)
    if layers is None:
        rows["embedder / 30 guided steps, DoD-XL/2 of full depth (one is measured)"] = share.times(30)
    else:
        factor = full_depth_factor("XL", transformer)
        rows[f"embedder / 30 guided steps, DoD-XL/2 (of one, {layers} of 36 blocks; the rest by FLOPs)"] = share.times(
            30 * factor
        )
    return rows


@torch.no_grad()
def _embedder_share(transformer, embedder, args) -> Ratio:
    batch = 2 if args.device == "cpu" else args.batch_size
    latents, timesteps, labels = inputs(2 * batch, args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32  # of the embedder's output under autocast
    prior = torch.zeros(2 * batch, 256, transformer.inner_dim, device=args.device, dtype=dtype)

    def embed():
        with torch.no_grad(), precision(args.device):
            embedder(latents[:batch])

    def guided_step():
        with torch.no_grad(), precision(args.device):
            transformer(latents, timesteps, labels, encoder_hidden_states=prior)

    return compare(embed, guided_step, args.repeats)


def scaling_rows(args) -> dict[str, Ratio]:
    """A training step of twice the batch, or of twice the tokens, against two."""
    transformer, _ = make_models("B", args.layers, args.device)
    batch = args.batch_size
    one = backbone_step(transformer, batch, args.device)

    def two():
        one(), one()

    twice = backbone_step(transformer, 2 * batch, args.device)
    tall = backbone_step(transformer, batch, args.device, height=64)
    return {
        f"train step, batch {2 * batch} / two of batch {batch}": compare(twice, two, args.repeats),
        "train step, 512 tokens / two of 256 tokens": compare(tall, two, args.repeats),
    }


def compile_rows(args) -> dict[str, Ratio]:
    """Blocks compiled by `compile_repeated_blocks` against eager ones, and fused q, k and v against separate ones."""
    eager, _ = make_models("B", args.layers, args.device)
    compiled, _ = make_models("B", args.layers, args.device)
    compiled.compile_repeated_blocks(fullgraph=True)
    arguments = inputs(args.batch_size, args.device)

    @torch.no_grad()
    def forward(model):
        with precision(args.device):
            model(*arguments)

    rows = {
        "forward, compiled blocks / eager": compare(lambda: forward(compiled), lambda: forward(eager), args.repeats),
        "train step, compiled blocks / eager": compare(
            backbone_step(compiled, args.batch_size, args.device),
            backbone_step(eager, args.batch_size, args.device),
            args.repeats,
        ),
    }
    fused, _ = make_models("B", args.layers, args.device)
    fused.fuse_qkv_projections()
    rows["forward, fused q/k/v / separate"] = compare(lambda: forward(fused), lambda: forward(eager), args.repeats)
    return rows


def bfloat16_rows(args) -> dict[str, Ratio]:
    """bfloat16 autocast against float32, and attention's share in it."""
    transformer, _ = make_models("B", args.layers, args.device)
    steps = [
        backbone_step(transformer, args.batch_size, args.device, autocast)
        for autocast in (torch.autocast(args.device, torch.bfloat16), nullcontext())
    ]
    rows = {"train step, bfloat16 autocast / float32": compare(*steps, args.repeats)}
    arguments = inputs(args.batch_size, args.device)

    @torch.no_grad()
    def forward(enabled):
        with torch.autocast(args.device, torch.bfloat16, enabled=enabled):
            transformer(*arguments)

    rows["forward, bfloat16 autocast / float32"] = compare(lambda: forward(True), lambda: forward(False), args.repeats)

    def attention(dtype, backward):
        query, key, value = (
            torch.randn(args.batch_size, 12, 256, 64, device=args.device, dtype=dtype, requires_grad=backward)
            for _ in range(3)
        )

        def run():
            output = F.scaled_dot_product_attention(query, key, value)
            if backward:
                output.sum().backward()

        return run

    for name, backward in (("forward", False), ("forward and backward", True)):
        rows[f"attention, {name}, bfloat16 / float32"] = compare(
            attention(torch.bfloat16, backward), attention(torch.float32, backward), args.repeats
        )
    return rows

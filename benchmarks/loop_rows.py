"""What a step of `diffusers-dod train` takes beyond the work of its models."""

import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

from cached_latent_loading import write_random_cache
from interleaved import Ratio, seconds
from workloads import joint_step

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# Models so small that what is around them shows, on latents as large as those of 256x256 images.
TRANSFORMER = {"sample_size": 32, "patch_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
EMBEDDER = {
    "sample_size": 32,
    "patch_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "output_dim": 32,
    "output_patch_size": 8,
}
SHORT, LONG = 20, 120


def loop_rows(args) -> dict[str, Ratio | float]:
    """Steps of the script on cached latents, from runs of two lengths, against bare steps of the same models."""
    from diffusers_dod.training.__main__ import main

    batch = 8 if args.device == "cpu" else args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write_random_cache(f"{folder}/latents", 1024, 512).save_pretrained(f"{folder}/vae")
        runs = itertools.count()

        def train(steps: int) -> None:
            options = {
                "latents_dir": f"{folder}/latents",
                "vae_name_or_path": f"{folder}/vae",
                "output_dir": f"{folder}/run-{next(runs)}",
                "num_classes": 1000,
                "transformer_config": json.dumps(TRANSFORMER),
                "embedder_config": json.dumps(EMBEDDER),
                "train_batch_size": batch,
                "optimizer": "adamw_fused",
                "max_train_steps": steps,
                "checkpointing_steps": 10 * LONG,
                "validation_steps": 0,
                "report_to": "none",
            }
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                main([argument for name, value in options.items() for argument in (f"--{name}", str(value))])

        transformer = DoDTransformer2DModel(num_classes=1000, **TRANSFORMER).to(args.device)
        embedder = DoDLatentEmbedder(**EMBEDDER).to(args.device)
        bare = joint_step(transformer, embedder, batch, args.device)
        train(SHORT), bare()
        pairs = []
        for _ in range(args.repeats):
            loop = (seconds(lambda: train(LONG)) - seconds(lambda: train(SHORT))) / (LONG - SHORT)
            pairs.append((loop, statistics.median(seconds(bare) for _ in range(LONG - SHORT))))
    beyond = 1e3 * statistics.median(loop - step for loop, step in pairs)
    return {
        f"step of train / bare step, very small models, batch {batch}": Ratio.of_pairs(pairs),
        "the same, ms that the script's step takes more": beyond,
    }

"""Trains Diffusion on Diffusion (arXiv 2410.08531) on images, from scratch or from a saved pipeline.

Images come from a folder with one subfolder per class, a folder of `datasets.save_to_disk` or a Hub dataset.
Without a VAE the model works on pixels:

    diffusers-dod train --train_data_dir digits --output_dir dod-digits --resolution 28 \\
        --transformer_config '{"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}' \\
        --embedder_config '{"num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4}' \\
        --train_batch_size 64 --max_train_steps 5000

On the latents of a VAE, with a recipe (DoD-XL, batch 256) and 8 GPUs:

    accelerate launch --num_processes 8 -m diffusers_dod train --recipe examples/recipes/imagenet256.yaml \\
        --preset XL --train_data_dir imagenet/train --train_batch_size 32 --dataloader_num_workers 8 --output_dir dod-xl

`output_dir` then loads with `DoDPipeline.from_pretrained`. During training it receives `checkpoint-N` folders, sample
grids in `samples/` (columns are classes, with three samples per stage), the logs, `training_config.json` and
`environment.json`.

To resume an interrupted run, repeat the same command; a finished run ends at once with status 0. Only one process, or
group of processes, can train in a folder at a time. On SIGINT, the command writes a checkpoint and exits with status
130; on SIGTERM, or if its launcher dies, with status 143. Bad input gives a one-line message and status 2. If a
checkpoint cannot be written, for instance because the disk is full, the older ones stay intact and training continues;
if it was the last one, the exit status is 1. More than `--max_skipped_steps` bad updates in a row give status 3.
`accelerate launch` turns every status but 0 into 1; on one device use `diffusers-dod train`.

Every random number of a step follows from the seed, the step and the row's position in the global batch. A resumed run
thus takes the steps that an unbroken one would have taken, bit for bit on the same machine, and any number of processes
and accumulation steps trains on the same rows with the same noise, as long as the global batch stays the same. Only a
stream's order depends on the number of processes.
"""

import sys

from ..cli import run
from .options import parse_args
from .stopping import note_launcher


def train_model(argv: list[str]) -> int:
    note_launcher()
    args = parse_args(argv, __doc__)
    from .loop import train

    return train(args)


def main(argv: list[str] | None = None) -> int:
    return run(train_model, "diffusers-dod train", argv)


if __name__ == "__main__":
    sys.exit(main())

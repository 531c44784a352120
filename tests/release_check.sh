#!/usr/bin/env bash
# Builds sdist and wheel, looks into both, installs the wheel into an empty environment and runs the quickstart from it, cut to
# a few steps: `release_check.sh PYTHON`, a Python that has `build`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# 1. The sdist, and the wheel from it, in an environment of their own
"$python" -m build --outdir "$scratch/dist" . > "$scratch/log" || { cat "$scratch/log"; exit 1; }
"$python" tests/release_contents.py "$scratch"/dist/*.whl "$scratch"/dist/*.tar.gz

# 2. The wheel alone, and the quickstart away from this folder
"$python" -m venv "$scratch/environment"
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
wheel=$(echo "$scratch"/dist/*.whl)
"$scratch/environment/bin/python" -m pip install --quiet --no-compile --constraint constraints.txt "$wheel[examples]"
cp examples/quickstart.py examples/digits.py examples/classifier.py "$scratch"
cd "$scratch"
# Compiling would take longer than all the rest.
TORCHDYNAMO_DISABLE=1 environment/bin/python quickstart.py --max_steps 5 --num_samples 20 --output_dir .
environment/bin/python - <<'PYTHON'
from importlib.resources import files

import diffusers_dod
from diffusers_dod.convert import imagenet_labels
from diffusers_dod.model_card import build_card

assert "environment" in diffusers_dod.__file__, diffusers_dod.__file__
pipe = diffusers_dod.DoDPipeline.from_pretrained("pipeline")
assert len(pipe([3, 8], num_stages=2, num_inference_steps=2).images) == 2
assert len(imagenet_labels()) == 1000 and files("diffusers_dod").joinpath("py.typed").is_file()
assert "license: mit" in build_card("pipeline", "user/model", "mit")
PYTHON
environment/bin/python -m diffusers_dod.hub check pipeline --license mit
echo "The release is in order."

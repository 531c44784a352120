"""What quantised weights do to the pictures of the trained digits model: fills the table in docs/support.md.

    python benchmarks/quantisation.py

Each row quantises the transformer by diffusers' `PipelineQuantizationConfig`, draws the same digits from the same noise as
float32 does, saves the pipeline and loads it again. The change is the mean absolute difference of pixels in [0, 1]; FD is the
Fréchet distance to the real digits in the features of `examples/classifier.py`. A package that is missing, or needs a GPU, is
a row that says so.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PipelineQuantizationConfig

from diffusers_dod import DoDPipeline


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from classifier import measure, train_classifier  # noqa: E402
from digits import load_digits  # noqa: E402


MODEL = ROOT / "examples/pretrained/digits"
PAGE = ROOT / "docs/support.md"
BEGIN, END = "<!-- benchmarks/quantisation.py -->\n", "<!-- end -->\n"


def torchao(name: str) -> Callable:
    def config():
        import torchao.quantization
        from diffusers import TorchAoConfig

        return TorchAoConfig(getattr(torchao.quantization, name)())

    return config


def quanto(dtype: str) -> Callable:
    def config():
        from diffusers import QuantoConfig

        return QuantoConfig(weights_dtype=dtype)

    return config


def bitsandbytes(**options: bool) -> Callable:
    def config():
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return config


METHODS: dict[str, Callable | None] = {
    "none": None,
    "torchao, int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao, int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, float8 weights": torchao("Float8WeightOnlyConfig"),
    "quanto, int8 weights": quanto("int8"),
    "quanto, float8 weights": quanto("float8"),
    "quanto, int4 weights": quanto("int4"),
    "bitsandbytes, int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes, 4 bits": bitsandbytes(load_in_4bit=True),
}


def load(folder: str | Path, config: Callable | None = None) -> DoDPipeline:
    """The pipeline in float32, its transformer quantised if there is a configuration."""
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": config()}) if config is not None else None
    pipe = DoDPipeline.from_pretrained(folder, quantization_config=quantization, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DoDPipeline, labels: list[int], batch_size: int = 100) -> torch.Tensor:
    """Images in [0, 1], `(labels, 1, 28, 28)`, the same noise for every pipeline."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 12, "guidance_scale": 1.0, "code_guidance_scale": 1.0}
    options |= {"generator": generator, "output_type": "pt"}
    return torch.cat([pipe(labels[i : i + batch_size], **options).images for i in range(0, len(labels), batch_size)])


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")) / 1e6


def measure_method(config: Callable | None, labels: list[int], exact: torch.Tensor | None, referee: tuple) -> dict:
    """Figures of one method, or what is in its way."""
    try:
        pipe = load(MODEL, config)
        images = draw(pipe, labels)
    except (ImportError, RuntimeError, ValueError) as error:
        return {"error": str(error).splitlines()[0]}
    classifier, reference = referee
    distance, _ = measure(classifier, images * 2 - 1, torch.tensor(labels), reference)
    change = 0.0 if exact is None else (images - exact).abs().mean().item()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = draw(load(folder), labels[:10])
        same = torch.equal(again, draw(load(MODEL, config), labels[:10]))
        size = megabytes(Path(folder))
    return {"megabytes": size, "change": change, "fd": distance, "saved_equal": same, "images": images}


def versions() -> str:
    """What was measured with, of the packages that are installed."""
    found = []
    for name in ("torchao", "optimum-quanto", "bitsandbytes", "diffusers", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def table(rows: dict[str, dict], num_samples: int) -> str:
    lines = [
        "| weights of the transformer | MB | mean change of a pixel in [0, 1] | FD | saved and loaded |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            reason = "needs a GPU" if "GPU" in row["error"] else "not installed"
            lines.append(f"| {name} | untested: {reason} | | | |")
            continue
        same = "the same" if row["saved_equal"] else "differs"
        change = f"{row['change']:.4f}" if row["change"] else ""
        lines.append(f"| {name} | {row['megabytes']:.1f} | {change} | {row['fd']:.2f} | {same} |")
    sampling = f"{num_samples} digits, one stage of 12 steps, without guidance"
    lines += ["", f"*{sampling}; FD in the features of `examples/classifier.py`; {versions()}.*"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=300, help="digits that are drawn")
    parser.add_argument("--dry_run", action="store_true", help="print the table and leave the page alone")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))

    labels = [number % 10 for number in range(args.num_samples)]
    real, real_labels = load_digits()
    classifier, _ = train_classifier(real, real_labels)
    with torch.no_grad():
        referee = classifier, classifier.features(real)

    rows: dict[str, dict] = {}
    exact = None
    for name, config in METHODS.items():
        rows[name] = measure_method(config, labels, exact, referee)
        exact = rows[name].pop("images", None) if exact is None else exact
        rows[name].pop("images", None)
        print(json.dumps({"method": name, **rows[name]}), flush=True)
    written = table(rows, args.num_samples)
    print(written)
    if not args.dry_run:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + BEGIN + written + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

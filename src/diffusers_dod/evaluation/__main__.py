"""Compares samples with a reference by the metrics that papers report, and prints the result as JSON.

    diffusers-dod evaluate --samples samples/stage-2.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --output outputs/mine/evaluation.json

Samples and reference are folders of images, `.npz` files in ADM's format, folders of `datasets.save_to_disk` or Hub
datasets. If the reference is an `.npz` with statistics, FID and sFID use these. `--extractor` is `inception` (FID,
sFID, Inception Score, KID as in papers; offline, pass torch-fidelity's file as `--extractor_weights`) or a
transformers vision model such as `facebook/dinov2-large` (FD-DINOv2), whose name is then part of the metrics' names.
`--settings` adds the `sampling.json` of `diffusers-dod sample`. If `--output` is `evaluation.json` in the model's
folder, `diffusers-dod hub push` reports it in the model card.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from .. import __version__
from ..cli import BadInput, Parser, bad_input, json_object, number, run
from .names import METRICS


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod evaluate", description=__doc__)
    add = parser.add_argument
    add("--samples", required=True, help="what to evaluate")
    add("--reference", required=True, help="what to compare it with")
    add("--extractor", default="inception", help="inception, or a transformers vision model")
    add("--extractor_weights", help="file of torch-fidelity's Inception weights; default: downloaded")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="metrics to compute; default: all")
    add("--resolution", type=number(int, 1), help="side in pixels after ADM's centre crop; default: images unchanged")
    add("--settings", type=json_object, help="sampling.json of the samples, for the report; default: none")
    add("--stage", type=number(int, 1), help="stage of the samples, for the report")
    add("--batch_size", type=number(int, 1), default=64, help="images per forward of the extractor")
    add("--num_workers", type=number(int, 0), default=0, help="processes that read images")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of subsets and splits")
    add("--output", help="JSON file to write; the result is printed in any case")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if {"is", "kid"} & set(args.metrics) and importlib.util.find_spec("torchmetrics") is None:
        cure = "`pip install torchmetrics`, or name other metrics with --metrics"
        parser.error(f"the metrics `is` and `kid` need torchmetrics: {cure}")
    return args


def report(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm

    from ..files import check_writable, write_json
    from .extractors import InceptionExtractor, TransformersExtractor
    from .images import ImageSet
    from .report import evaluate, extract_features

    with bad_input(ValueError, OSError, ImportError):
        # 1. Images and network
        if args.output:
            check_writable(args.output)
        settings = args.settings or {}
        versions = settings.get("versions", {})
        if not isinstance(versions, dict):
            raise BadInput("--settings: `versions` is no JSON object")
        samples, reference = (ImageSet(source, args.resolution) for source in (args.samples, args.reference))
        if args.extractor == "inception":
            extractor: torch.nn.Module = InceptionExtractor(args.extractor_weights)
        else:
            extractor = TransformersExtractor(args.extractor)
        extractor.to("cuda" if torch.cuda.is_available() else "cpu")

        # 2. Features and metrics
        features = extract_features(samples, extractor, args.batch_size, args.num_workers, tqdm)
        reference_features = extract_features(reference, extractor, args.batch_size, args.num_workers, tqdm)
        label = str(extractor.label)
        results = evaluate(features, reference, reference_features, label, tuple(args.metrics), args.seed)

    # 3. The report
    record = {
        "reference": Path(args.reference).name if Path(args.reference).exists() else args.reference,
        "num_samples": len(samples),
        "num_reference": len(reference),
        "extractor": label,
        **{key: value for key, value in settings.items() if key not in ("model", "weights_sha256")},
        "evaluation_seed": args.seed,
        "versions": {**versions, "diffusers-dod": __version__},
        "results": [{**result, **({"stage": args.stage} if args.stage else {})} for result in results],
    }
    print(json.dumps(record, indent=2, ensure_ascii=False))
    if args.output:
        write_json(args.output, record)


def main(argv: list[str] | None = None) -> int:
    return run(lambda arguments: report(parse_args(arguments)), "diffusers-dod evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())

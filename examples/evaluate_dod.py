"""Compares samples with a reference by the metrics that papers report, and writes one JSON.

    python examples/evaluate_dod.py --samples samples/stage-2.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --extractor inception --output outputs/mine/evaluation.json

Samples and reference are folders of images, `.npz` files of ADM's evaluation (whose statistics are used), folders of
`datasets.save_to_disk` or datasets of the Hub. `--extractor` is `inception` (FID, sFID, Inception Score, KID as papers mean
them; `--extractor_weights` names torch-fidelity's file where there is no internet), or a vision model of transformers such
as `facebook/dinov2-large` (FD-DINOv2). Figures of anything but the Inception network carry its name. `--settings` adds a
`sampling.json` of sample_dod.py; `python -m diffusers_dod.hub push` puts the result into the model card.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

import diffusers_dod
from diffusers_dod.evaluation import (
    METRICS,
    ImageSet,
    InceptionExtractor,
    TransformersExtractor,
    evaluate,
    extract_features,
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--samples", required=True)
    add("--reference", required=True)
    add("--extractor", default="inception", help="inception, or a vision model of transformers")
    add("--extractor_weights", help="file of torch-fidelity's Inception weights")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    add("--resolution", type=int, help="side to which the images are cropped as ADM does; default: as they are")
    add("--settings", help="sampling.json of the samples")
    add("--stage", type=int, help="which stage the samples are of, for the report")
    add("--batch_size", type=int, default=64)
    add("--num_workers", type=int, default=0)
    add("--seed", type=int, default=0, help="of subsets and splits")
    add("--output", help="JSON to write; printed in any case")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        # 1. Images and network
        samples, reference = (ImageSet(source, args.resolution) for source in (args.samples, args.reference))
        if args.extractor == "inception":
            extractor = InceptionExtractor(args.extractor_weights)
        else:
            extractor = TransformersExtractor(args.extractor)
        extractor.to("cuda" if torch.cuda.is_available() else "cpu")

        # 2. Features and metrics
        features = extract_features(samples, extractor, args.batch_size, args.num_workers, tqdm)
        reference_features = extract_features(reference, extractor, args.batch_size, args.num_workers, tqdm)
        results = evaluate(features, reference, reference_features, extractor.label, tuple(args.metrics), args.seed)
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate_dod.py: error: {error}", file=sys.stderr)
        return 2

    # 3. The report
    settings = json.loads(Path(args.settings).read_text()) if args.settings else {}
    versions = {**settings.pop("versions", {}), "diffusers-dod": diffusers_dod.__version__}
    report = {
        "reference": Path(args.reference).name if Path(args.reference).exists() else args.reference,
        "num_samples": len(samples),
        "num_reference": len(reference),
        "extractor": extractor.label,
        **{key: value for key, value in settings.items() if key != "model"},
        "evaluation_seed": args.seed,
        "versions": versions,
        "results": [{**result, **({"stage": args.stage} if args.stage else {})} for result in results],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if args.output:
        unfinished = Path(args.output).with_name(f"tmp-{Path(args.output).name}")
        unfinished.write_text(text)
        unfinished.replace(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every image is decoded once before any work begins: the broken ones are named, and left out or refused."""

import argparse

import datasets
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..cli import BadInput
from .images import inspect_images


logger = get_logger(__name__, log_level="INFO")


def check_images(
    args: argparse.Namespace, data: datasets.Dataset, accelerator: Accelerator
) -> tuple[list[int], bool, list[str]]:
    """The rows that can be read, whether all images are grayscale, and the sums of the files of these rows.

    Raises:
        BadInput: if there are others and `args.on_broken_image` is `stop`, or if there is no readable one.
    """
    # Each process checks its share.
    share = data.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    report = inspect_images(share, args.dataloader_num_workers)
    problems, is_gray = gather_object(report["problem"][:]), all(gather_object(report["is_gray"][:]))
    rows = [row for row, problem in enumerate(problems) if not problem]
    broken = [problem for problem in problems if problem]
    if broken and (args.on_broken_image == "stop" or not rows):
        skip = "pass --on_broken_image skip to leave them out" if rows else "no image is left"
        raise BadInput(f"{len(broken)} of {len(problems)} images cannot be read, the first is {broken[0]}: {skip}")
    if broken:
        logger.warning("\n  ".join([f"Skipped {len(broken)} images, {len(rows)} are left:", *broken]))
    sums = gather_object(report["sha256"][:])
    return rows, is_gray, [sums[row] for row in rows]

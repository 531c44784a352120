"""Python that draws what the page shows."""

from pathlib import Path

from .codes import DECIMALS
from .drawing import Drawing


def python_code(drawing: Drawing, model: str, class_name: str, device: str) -> str:
    """Python that draws the same in a process of its own, and saves every stage.

    Args:
        drawing ([`Drawing`]): what was drawn.
        model (`str`): folder or repository that the pipeline was loaded from.
        class_name (`str`): for the comment.
        device (`str`): where the pipeline runs.
    """
    many, codes, noise = drawing.num_samples > 1, drawing.codes, drawing.noise_before
    lines = ["import torch"]
    if drawing.picture is not None:
        lines.append("from PIL import Image")
    lines += ["", "from diffusers_dod import DoDPipeline", ""]
    lines += [f"pipe = DoDPipeline.from_pretrained({model!r})" + ("" if device == "cpu" else f".to({device!r})")]

    if many:
        generator = (
            f"[torch.Generator().manual_seed(seed) for seed in range({drawing.seeds.start}, {drawing.seeds.stop})]"
        )
    else:
        generator = f"torch.Generator().manual_seed({drawing.seed})"
    if codes is not None:
        if (codes == codes[:1]).all():
            codes = codes[:1]  # the pipeline takes one for all samples
        lines.append("codes = torch.tensor([")
        for sample in codes.tolist():
            lines += ["    [", *(f"        {[round(x, DECIMALS) for x in code]}," for code in sample), "    ],"]
        lines.append("])")
    if noise is not None:
        lines.append(f"generator = {generator}")
        lines += ["for each in generator:"] if many else []
        source = "each" if many else "generator"
        lines.append(
            f"{'    ' * many}torch.randn({noise}, generator={source})  # the noise that the codes were drawn from"
        )
        generator = "generator"

    lines.append("stages = pipe(")
    for name, value in drawing.arguments().items():
        lines.append(f"    {name}={value!r}," + (f"  # {class_name!r}" if name == "class_labels" else ""))
    if drawing.picture is not None:
        lines.append(f"    image=Image.open({Path(drawing.picture).name!r}),  # in the place of stage 1")
    if codes is not None:
        lines.append("    codes=codes,")
    lines += [f"    generator={generator},", "    return_stages=True,", ").stages"]
    lines.append(f"for stage, images in enumerate(stages, start={drawing.first_stage}):")
    lines.append("    for sample, image in enumerate(images, start=1):")
    lines.append('        image.save(f"stage-{stage}-sample-{sample}.png")')
    return "\n".join(lines)

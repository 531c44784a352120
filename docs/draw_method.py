"""Draws how DoD works: `python docs/draw_method.py` writes docs/images/method.svg."""

from pathlib import Path
from xml.sax.saxutils import escape


INK, NOISE, MODEL, PRIOR, PICTURE = "#24292f", "#d0d7de", "#ddf4ff", "#fff8c5", "#dafbe1"
TARGET = Path(__file__).parent / "images" / "method.svg"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """A labelled rectangle."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
    top = y + height / 2 - 8 * (len(lines) - 1) + 4
    return shape + "".join(label(x + width / 2, top + 16 * i, line) for i, line in enumerate(lines))


def label(x: float, y: float, text: str, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def arrow(*points: tuple[int, int]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def draw() -> str:
    """The drawing: sampling in stages above, a training step below."""
    parts = [label(20, 28, "Sampling: every stage starts from noise, with the same weights", "start", "bold")]
    for stage in range(3):
        x = 20 + 300 * stage
        parts += [
            box(x + 40, 45, 90, 34, NOISE, "noise"),
            arrow((x + 85, 79), (x + 85, 108)),
            box(x, 110, 170, 50, MODEL, "transformer", f"stage {stage + 1}: N steps"),
            arrow((x + 85, 160), (x + 85, 188)),
            box(x + 20, 190, 130, 34, PICTURE, f"sample {stage + 1}"),
        ]
        if stage < 2:
            parts += [
                arrow((x + 150, 207), (x + 190, 207), (x + 190, 182)),
                box(x + 185, 134, 100, 46, PRIOR, "embedder,", "once per stage"),
                arrow((x + 285, 150), (x + 299, 150)),
            ]
    parts.append(label(105, 245, "sees the class only"))
    parts.append(label(405, 245, "sees the class and the prior"))
    parts.append(label(705, 245, "decoded by the autoencoder"))

    parts.append(label(20, 300, "Training: both models together, by the diffusion loss alone", "start", "bold"))
    parts += [
        box(20, 320, 120, 46, PICTURE, "true latents"),
        arrow((140, 332), (188, 332)),
        box(190, 316, 150, 34, NOISE, "+ noise, all rows"),
        arrow((340, 333), (578, 333)),
        arrow((80, 366), (80, 405), (148, 405)),
        box(150, 382, 100, 46, PRIOR, "encoder", "(ViT)"),
        arrow((250, 405), (278, 405)),
        box(280, 390, 110, 30, "#ffffff", "bottleneck"),
        arrow((390, 405), (418, 405)),
        box(420, 382, 100, 46, PRIOR, "decoder", "(ViT)"),
        arrow((520, 405), (620, 405), (620, 360)),
        label(335, 450, "a few numbers per token, for half of the rows; the others go without"),
        box(580, 312, 130, 46, MODEL, "transformer"),
        arrow((710, 335), (758, 335)),
        box(760, 312, 110, 46, "#ffffff", "loss"),
        label(632, 388, "prior tokens, added to", "start"),
        label(632, 404, "the patch embedding", "start"),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 465" font-family="sans-serif" font-size="13">'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs><rect width="900" height="465" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


if __name__ == "__main__":
    TARGET.write_text(draw())

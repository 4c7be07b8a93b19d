"""Draw docs/figures/architecture.svg, the picture of SHIP; a test fails while the file differs.

    python tools/draw_architecture.py

Boxes carry their own fill, and everything outside a box is of a grey that has a contrast of at
least 4 to white and to a dark page, so that one file serves both.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "architecture.svg"
WIDTH, HEIGHT = 960, 330
GREY = "#6e7781"
TRAINED, FROZEN, LATENT, TEXT = "#1f5fa8", "#5a4a8a", "#a3470d", "#3f4a55"
TITLE = "SHIP: an instruction becomes a LoRA of a frozen language model, and is read back from z"


@dataclass(frozen=True)
class Box:
    """A rounded box with its lines of text, the first of them bold."""

    left: float
    top: float
    width: float
    height: float
    fill: str
    lines: tuple[str, ...]

    @property
    def middle(self) -> float:
        """The height at which an arrow meets the box."""
        return self.top + self.height / 2

    @property
    def centre(self) -> float:
        """Where an arrow from above or below meets it."""
        return self.left + self.width / 2

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    def svg(self) -> list[str]:
        """The rectangle and its centred lines."""
        first = self.middle - 9 * (len(self.lines) - 1) + 5
        return [
            f'<rect x="{self.left:g}" y="{self.top:g}" width="{self.width:g}" '
            f'height="{self.height:g}" rx="8" fill="{self.fill}"/>',
            *(
                text(self.centre, first + 18 * row, line, "#ffffff", bold=row == 0)
                for row, line in enumerate(self.lines)
            ),
        ]


def text(
    x: float,
    y: float,
    words: str,
    colour: str = GREY,
    *,
    bold: bool = False,
    anchor: str = "middle",
) -> str:
    """One line of text around, after or before (x, y)."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{weight}>'
        f"{escape(words)}</text>"
    )


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a head at the last one."""
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return (
        f'<path d="M {path}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#head)"/>'
    )


INSTRUCTION = Box(10, 50, 150, 66, TEXT, ("instruction k", "“keep the numbers", "greater than 4”"))
ENCODER = Box(200, 50, 120, 66, TRAINED, ("encoder", "LM + LoRA"))
POSTERIOR = Box(360, 50, 116, 66, LATENT, ("q(z | k)", "mean, variance"))
Z = Box(518, 56, 54, 54, LATENT, ("z",))
HYPERNETWORK = Box(614, 50, 130, 66, TRAINED, ("hypernetwork", "MLP"))
LORA = Box(786, 50, 110, 66, LATENT, ("LoRA", "of z"))
INDUCED = Box(10, 210, 150, 66, TEXT, ("instruction k", "read back from z"))
DECODER = Box(485, 210, 120, 66, TRAINED, ("decoder", "LM + LoRA"))
TASK_LLM = Box(786, 210, 110, 66, FROZEN, ("Task LLM", "frozen, 4-bit"))
BOXES = (INSTRUCTION, ENCODER, POSTERIOR, Z, HYPERNETWORK, LORA, INDUCED, DECODER, TASK_LLM)


def draw() -> str:
    """The picture as SVG."""
    arrows = [
        *(
            arrow((a.right + 2, a.middle), (b.left - 8, b.middle))
            for a, b in itertools.pairwise(BOXES[:6])
        ),
        arrow((Z.centre, Z.bottom + 2), (Z.centre, DECODER.top - 8)),
        arrow((DECODER.left - 2, DECODER.middle), (INDUCED.right + 8, INDUCED.middle)),
        arrow((LORA.centre, LORA.bottom + 2), (TASK_LLM.centre, TASK_LLM.top - 8)),
        arrow((744, TASK_LLM.middle), (TASK_LLM.left - 8, TASK_LLM.middle)),
        arrow((TASK_LLM.right + 2, TASK_LLM.middle), (930, TASK_LLM.middle)),
        arrow((DECODER.centre, 300), (DECODER.centre, DECODER.bottom + 8)),
    ]
    labels = [
        text(10, 30, "deduction: an instruction becomes parameters", bold=True, anchor="start"),
        text(10, 196, "induction: what z does, in words", bold=True, anchor="start"),
        text(736, TASK_LLM.middle + 5, "input x", anchor="end"),
        text(940, TASK_LLM.middle + 5, "y", anchor="start"),
        text(DECODER.centre, 317, "examples (x, y), where there are any"),
        text(POSTERIOR.centre, 136, "close to N(0, I)"),
        text(TASK_LLM.centre, 296, "no k in its prompt"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="14" role="img">',
            f"<title>{escape(TITLE)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="4" '
            f'markerHeight="4" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{GREY}"/>'
            "</marker></defs>",
            *arrows,
            *(line for box in BOXES for line in box.svg()),
            *labels,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw())
    print(f"{PICTURE}: drawn")


if __name__ == "__main__":
    main()

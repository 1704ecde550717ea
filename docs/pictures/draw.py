"""Draws the pictures of "How it works": a weight, a gradient, a request.

    python docs/pictures/draw.py        # writes the three .svg files beside this file

One file serves a light and a dark background: its colours follow what the reader's system prefers.
"""

import math
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 480
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a }
.name { font-size: 15px; font-weight: 600; fill: #1f2328 }
.code { font: 12px ui-monospace, monospace; fill: #1f2328 }
.box { fill: #f6f8fa; stroke: #afb8c1 }
.room { fill: none; stroke: #afb8c1; stroke-dasharray: 5 4 }
.line { stroke: #6e7781; stroke-width: 1.5; fill: none }
.head { fill: #6e7781 }
.bar { fill: #b6bec7 }
.mark { stroke: #0969da; stroke-width: 2 }
.ours { fill: #ddf4ff; stroke: #54aeff }
@media (prefers-color-scheme: dark) {
  text { fill: #9da7b3 }
  .name, .code { fill: #e6edf3 }
  .box { fill: #212830; stroke: #4c5661 }
  .room { stroke: #4c5661 }
  .line { stroke: #9198a1 }
  .head { fill: #9198a1 }
  .bar { fill: #5c6773 }
  .mark { stroke: #58a6ff }
  .ours { fill: #12304f; stroke: #388bfd }
}
"""


class Picture:
    """A drawing that grows downwards: `y` is where the next part begins."""

    def __init__(self, title: str) -> None:
        self.title, self.parts, self.y = title, [], 8.0

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def rectangle(self, x: float, y: float, width: float, height: float, kind: str = "box", radius: float = 8) -> None:
        size = f'width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" {size} rx="{radius:g}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        self.parts.append(f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>')

    def box(self, name: str, *lines: str, x: float = 8, width: float = WIDTH - 16, kind: str = "box", extra: float = 0) -> float:
        """A box with a name and lines under it, and `extra` room for a drawing, whose y is returned. Does not move on."""
        height = 32 + 19 * len(lines) + extra
        self.rectangle(x, self.y, width, height, kind)
        self.text(x + 14, self.y + 22, name, "name")
        for i, words in enumerate(lines):
            self.text(x + 14, self.y + 42 + 19 * i, words)
        return self.y + 30 + 19 * len(lines)

    def step(self, name: str, *lines: str, extra: float = 0, **options: object) -> float:
        """A box, and on to below it."""
        at = self.box(name, *lines, extra=extra, **options)
        self.y += 32 + 19 * len(lines) + extra
        return at

    def arrow(self, words: str = "", x: float = WIDTH / 2, length: float = 34) -> None:
        """Down to the next part, with words beside it."""
        self.down(x, self.y + 2, self.y + length - 3)
        if words:
            self.text(x + 12, self.y + length / 2 + 4, words)
        self.y += length

    def down(self, x: float, y1: float, y2: float) -> None:
        self.line(x, y1, x, y2 - 6)
        self.parts.append(f'<path class="head" d="M{x - 5:g},{y2 - 7:g} h10 l-5,8 z"/>')

    def svg(self) -> str:
        size = f"0 0 {WIDTH} {math.ceil(self.y + 8)}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img"><title>{escape(self.title)}</title>'
        return "\n".join([head, f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])


def weight() -> str:
    """A weight from from_pretrained to packed bytes."""
    p = Picture("A weight on its way from from_pretrained to packed bytes")
    p.step("weight (rows, cols)", "fp32, fp16 or bf16, as from_pretrained loaded it")
    p.arrow("values (B, N): one problem a tensor, a row or a group", x=60)
    top = p.step("centroids (B, 2^bits), ascending", "the partition of the values with the least squared error", extra=92)
    histogram(p, top + 4, 78)
    p.arrow("nearest centroid; a tie goes to the lower index", x=60)
    top = p.step("assignments (rows, cols), uint8", extra=40)
    indices = (9, 4, 7, 12, 8, 1, 7, 10, 6, 15, 8, 3, 11, 7)
    for i, index in enumerate(indices):
        p.rectangle(22 + 31 * i, top + 2, 29, 26, "ours", 3)
        p.text(36.5 + 31 * i, top + 20, str(index), "code", "middle")
    p.arrow("pack: a row in blocks of 128 columns, 16 x bits bytes each", x=60)
    top = p.step("packed (rows, row_bytes), uint8", "4 bits: 16 lanes of 4 bytes; field j of lane c is column 16 j + c", extra=92)
    for lane in range(16):
        p.rectangle(22 + 27.3 * lane, top + 2, 25.3, 24, "ours", 3)
        p.text(34.6 + 27.3 * lane, top + 18, str(lane), "code", "middle")
    p.line(22, top + 28, 22, top + 52)
    p.line(47.3, top + 28, 456, top + 52)
    for field in range(8):
        p.rectangle(22 + 54.4 * field, top + 54, 52.4, 24, "ours", 3)
        p.text(48.2 + 54.4 * field, top + 70, f"col {16 * (7 - field)}", "code", "middle")
    p.arrow("quantize_ puts them in the place of the weight", x=60)
    top = p.step("CodebookLinear or CodebookEmbedding", extra=66)
    p.rectangle(22, top + 2, 212, 50, "ours", 6)
    p.text(34, top + 22, "codebook (G, 2^bits)", "name")
    p.text(34, top + 41, "a parameter that trains")
    p.rectangle(246, top + 2, 212, 50, "ours", 6)
    p.text(258, top + 22, "packed", "name")
    p.text(258, top + 41, "a buffer: it never trains")
    p.arrow("save_pretrained", x=60)
    p.step("model.safetensors and config.json", "the state dict as it is: no other form is stored")
    return p.svg()


def histogram(p: Picture, top: float, height: float) -> None:
    """Bars of a normal distribution and the centroids of its best partition into sixteen (Max 1960)."""
    bars, left, right = 52, 26.0, WIDTH - 26.0
    step = (right - left) / bars
    for i in range(bars):
        z = (i + 0.5 - bars / 2) / (bars / 6.4)
        tall = height * math.exp(-z * z / 2)
        p.rectangle(left + i * step + 1, top + height - tall, step - 2, tall, "bar", 1)
    half = (0.128, 0.388, 0.657, 0.942, 1.256, 1.618, 2.069, 2.733)
    for z in (*(-z for z in half), *half):
        x = left + (z * bars / 6.4 + bars / 2) * step
        p.line(x, top + 4, x, top + height, "mark")


def gradient() -> str:
    """A gradient back to a codebook."""
    p = Picture("A gradient on its way back to a codebook")
    p.box("input (M, IN)", "kept from the forward pass", width=226)
    p.step("grad_output (M, OUT)", "from the layer above", x=246, width=226)
    p.down(121, p.y + 2, p.y + 31)
    p.down(359, p.y + 2, p.y + 31)
    p.y += 34
    p.step("a tile of grad_output' x input", "in cache or registers; the weight gradient never exists whole", kind="ours")
    p.arrow("each value goes to the bin of its index, read from packed", x=60)
    top = p.step("sums of a tile by centroid", extra=66)
    cells = ((1, 3, 0, 2), (2, 1, 3, 3))
    for i, row in enumerate(cells):
        for j, index in enumerate(row):
            p.rectangle(22 + 34 * j, top + 2 + 27 * i, 32, 25, "ours", 3)
            p.text(38 + 34 * j, top + 19 + 27 * i, str(index), "code", "middle")
    p.line(168, top + 28, 246, top + 28)
    p.parts.append(f'<path class="head" d="M{246:g},{top + 23:g} v10 l8,-5 z"/>')
    for k in range(4):
        p.rectangle(264 + 48 * k, top + 15, 46, 26, "ours", 3)
        p.text(287 + 48 * k, top + 32, f"bin {k}", "code", "middle")
    p.arrow("partial sums, added in a fixed order", x=60)
    p.step("gradient of the codebook (G, 2^bits)", 'fp32 or wider; grad_reduction "mean" divides by the members')
    p.arrow("AdamW; codebooks at 5 times the rate (--codebook-lr-mult)", x=60)
    p.step("codebook, moved; packed, as it was", "no weight, weight gradient or optimizer state of a weight exists")
    p.y += 16
    p.step(
        "Beside it",
        "an embedding: from (grad_output, ids), the rows of the batch only",
        "the input's gradient: grad_output x weight, decoded tile by tile",
    )
    return p.svg()


def request() -> str:
    """A request through an encoder."""
    p = Picture("A request on its way through an encoder")
    p.step("token ids (batch, tokens)", "from the tokenizer; M = batch x tokens rows reach each layer")
    p.arrow(x=60, length=26)
    p.step("CodebookEmbedding", "decodes the rows asked for, no others", kind="ours")
    p.arrow(x=60, length=26)
    start = p.y
    p.y += 30
    inner = {"x": 22, "width": WIDTH - 44}
    p.step("CodebookLinear: query, key, value", kind="ours", **inner)
    p.arrow(x=74, length=20)
    p.step("attention", "torch's", **inner)
    p.arrow(x=74, length=20)
    p.step("CodebookLinear: output", kind="ours", **inner)
    p.arrow("add, LayerNorm: torch's", x=74, length=30)
    p.step("CodebookLinear: up", kind="ours", **inner)
    p.arrow("GELU: torch's", x=74, length=30)
    p.step("CodebookLinear: down", kind="ours", **inner)
    p.y += 14
    p.text(22, start + 20, "each layer", "name")
    p.rectangle(8, start, WIDTH - 16, p.y - start, "room")
    p.arrow("add, LayerNorm: torch's", x=60, length=30)
    p.step("classification layer", "kept in floating point; logits")
    p.y += 20
    lines = (
        "CPU, few rows (AVX-512: 32, AVX2: 16): decoded in registers",
        "CPU, more rows: panels of weights decoded into the cache",
        "GPU, few rows: narrow tiles, the reduction cut into pieces",
        "GPU, more rows: wider tiles, each decoded as it is multiplied",
        "GPU, many rows: decoded once, then cuBLAS",
    )
    p.step("CodebookLinear, by the rows of its input", *lines, kind="ours")
    return p.svg()


def drawings() -> dict[Path, str]:
    """Each file of this script and its content."""
    return {HERE / f"{draw.__name__}.svg": draw() for draw in (weight, gradient, request)}


if __name__ == "__main__":
    for file, content in drawings().items():
        file.write_text(content)

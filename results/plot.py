"""Draws accuracy against size from accuracy_sst2_cola.json, once for a light and once for a dark background.

    python results/plot.py        # writes accuracy_light.svg and accuracy_dark.svg beside this file

Points are means over the seeds with their standard errors; k-means and linear, after clustering (hollow) and after stage 3
(filled); the band is the fp32 model after stage 1.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 56, 58
LOW, HIGH = 0.45, 0.92
SIZES = [1, 2, 3, 4, 8, 32]

# Ink, faint ink, grid, and the two of Okabe and Ito's colours that every colour vision tells apart.
THEMES = {
    "light": {"ink": "#1f2328", "faint": "#57606a", "grid": "#d8dee4", "kmeans": "#0072b2", "linear": "#c04f00"},
    "dark": {"ink": "#e6edf3", "faint": "#9da7b3", "grid": "#373e47", "kmeans": "#56b4e9", "linear": "#f0995a"},
}


def at(bits: float, accuracy: float) -> tuple[float, float]:
    across = math.log2(bits / 0.9) / math.log2(36 / 0.9)
    up = (accuracy - LOW) / (HIGH - LOW)
    return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)


def grid(colours: dict[str, str]) -> list[str]:
    parts = []
    for accuracy in (0.5, 0.6, 0.7, 0.8, 0.9):
        x, y = at(0.9, accuracy)
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{colours["grid"]}"/>')
        parts.append(f'<text x="{x - 10}" y="{y + 5}" text-anchor="end" fill="{colours["faint"]}">{accuracy:.1f}</text>')
    for bits in SIZES:
        x, y = at(bits, LOW)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{y}" y2="{y + 6}" stroke="{colours["faint"]}"/>')
        parts.append(f'<text x="{x}" y="{y + 23}" text-anchor="middle" fill="{colours["faint"]}">{bits}</text>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    label = "bits per weight, codebooks and everything kept in fp32 included"
    parts.append(f'<text x="{centre}" y="{HEIGHT - 12}" text-anchor="middle" fill="{colours["ink"]}">{label}</text>')
    return parts


def series(rows: list[dict], stage: str, colour: str, filled: bool) -> list[str]:
    points = [at(row["bits_per_weight"], row[stage][0]) for row in rows]
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = "" if filled else ' stroke-dasharray="5 4"'
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for row, (x, y) in zip(rows, points, strict=True):
        mean, error = row[stage]
        top, bottom = at(1, mean + error)[1], at(1, mean - error)[1]
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" stroke="{colour}" stroke-width="1.5"/>')
        inside = colour if filled else "none"
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{inside}" stroke="{colour}" stroke-width="2"/>')
    return parts


def draw(results: dict, colours: dict[str, str]) -> str:
    title = f"Accuracy on {results['task']}, {results['model']}, {results['seeds']} seeds"
    mean, error = results["fp32"]["stage1"]
    x, top = at(0.9, mean + error)
    bottom = at(0.9, mean - error)[1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="system-ui, sans-serif" font-size="15">',
        f"<title>{title}, against bits per weight</title>",
        *grid(colours),
        f'<rect x="{x}" y="{top}" width="{WIDTH - RIGHT - x}" height="{bottom - top}" fill="{colours["faint"]}" opacity="0.45"/>',
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 19}" text-anchor="end" fill="{colours["ink"]}">fp32 {mean:.3f}</text>',
        f'<text x="{LEFT - 48}" y="22" font-size="17" font-weight="600" fill="{colours["ink"]}">{title}</text>',
    ]
    for scheme in ("linear", "kmeans"):
        parts += series(results[scheme], "stage2", colours[scheme], filled=False)
        parts += series(results[scheme], "stage3", colours[scheme], filled=True)
    x, y = at(7.0, 0.66)
    for scheme, name in (("kmeans", "k-means"), ("linear", "linear")):
        for filled, when in ((True, "fine-tuned again"), (False, "clustered")):
            inside, dash = (colours[scheme], "") if filled else ("none", ' stroke-dasharray="5 4"')
            stroke = f'stroke="{colours[scheme]}" stroke-width="2"'
            parts.append(f'<line x1="{x}" x2="{x + 34}" y1="{y}" y2="{y}" {stroke}{dash}/>')
            parts.append(f'<circle cx="{x + 17}" cy="{y}" r="4.5" fill="{inside}" {stroke}/>')
            parts.append(f'<text x="{x + 44}" y="{y + 5}" fill="{colours["ink"]}">{name}, {when}</text>')
            y += 25
    return "\n".join([*parts, "</svg>", ""])


def drawings() -> dict[Path, str]:
    """Each file of this script and its content."""
    results = json.loads((HERE / "accuracy_sst2_cola.json").read_text())
    return {HERE / f"accuracy_{theme}.svg": draw(results, colours) for theme, colours in THEMES.items()}


if __name__ == "__main__":
    for file, content in drawings().items():
        file.write_text(content)

"""What all figures share: colours, axes, how names and PLWs are labelled, and how a figure becomes a file."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plw_mlflow.errors import printable
from plw_mlflow.transforms import Transform

# Okabe and Ito's colours, distinct to colour-blind readers; black is kept for means, and yellow is too pale for lines.
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2"]
CURVE_BLUE, SURE_RED, UNSURE_GREY = "#1b3a5c", "#B22222", "#707070"
ZERO_GREY, GRID_GREY = "#9a9a9a", "#e6e6e6"
DASHED = (0, (4, 2))
CHARACTER_WIDTH = 0.0125  # of a tick label, as a part of an axis of full width


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def clear_frame(axes: Axes) -> None:
    """Leave only the left and lower edge of the axes, with a pale grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID_GREY, linewidth=0.8)
    axes.set_axisbelow(True)


def plain(text: str, limit: int = 30) -> str:
    """A name from the data as matplotlib shows it literally: no formulas, not hidden, not wider than the figure."""
    text = printable(text)
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short.replace("$", r"\$").replace("_", " _", 1) if short.startswith("_") else short.replace("$", r"\$")


def tick_labels(transform: Transform, axis_width: float = 1.0) -> dict[float, str]:
    """w_p and label of the PLWs tried that can be labelled without touching another; both ends always are.

    axis_width: as a part of an axis that fills a figure ten inches wide.
    """
    places = [(float(w), f"{plw:.2g}") for w, plw in zip(transform(transform.plws), transform.plws, strict=True)]
    low, high = transform.ends
    span = (high - low) / axis_width

    def fits_beside(left: tuple[float, str], right: tuple[float, str]) -> bool:
        return right[0] - left[0] > span * CHARACTER_WIDTH * (1 + len(left[1]) / 2 + len(right[1]) / 2)

    shown = places[:1]
    for place in places[1:-1]:
        if fits_beside(shown[-1], place) and fits_beside(place, places[-1]):
            shown.append(place)
    return dict([*shown, places[-1]])


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    return _save(figure, "png", {"Software": None})


def smaller(picture: bytes, width: int) -> bytes:
    """A PNG scaled down to so many pixels of width, and to few colours, for a page that shows it as it is."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        scaled = image.convert("RGB").resize(
            (width, round(image.height * width / image.width)), Image.Resampling.LANCZOS
        )
    file = io.BytesIO()
    scaled.quantize(64).save(file, "png", optimize=True)
    return file.getvalue()


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes each time; letters are drawn as shapes, so that it looks the same anywhere."""
    with matplotlib.rc_context({"svg.hashsalt": "plw_mlflow", "svg.fonttype": "path"}):
        drawn = _save(figure, "svg", {"Date": None, "Creator": None, "Format": None, "Type": None})
    return _NOT_XML.sub("", drawn.decode()).encode()  # names from the data may have characters that XML may not


def _save(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata)
    # Now laid out, which takes longer than drawing does; the next file of this figure need not do it again.
    figure.set_layout_engine("none")
    return file.getvalue()

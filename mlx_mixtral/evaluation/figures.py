"""Figures by matplotlib, the extra ``plots``: as PNG files, and as SVG inside a page whose style sheet gives the colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

from mlx_mixtral.errors import MissingDependencyError
from mlx_mixtral.installing import how_to_install

__all__ = ["HIGH", "LOW", "PAPER", "TEXT", "Mark", "check_plotting", "inline_svg", "new_figure", "png", "style"]

Mark = tuple[Any, Sequence[str]]
"""An artist, and what each of the shapes it draws stands for."""

TEXT, SOFT, LINE, PAPER, HIGH, LOW = "#1b1f24", "#59636e", "#d8dee4", "#ffffff", "#2166ac", "#d6604d"
VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line", PAPER: "paper", HIGH: "hi", LOW: "lo"}
"""Colours of a figure that a page replaces by variables of its style sheet, which follow light and dark."""

STYLE = {
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 11,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}


def check_plotting() -> None:
    """Raise MissingDependencyError where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"plots need matplotlib: {how_to_install('matplotlib', 'plots')}") from error


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches.

    Raises:
        MissingDependencyError: no matplotlib.
    """
    check_plotting()
    # The object, not pyplot: no window system is asked for, and no state outlives the plot.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(**more: Any) -> Any:
    """A context in which figures look like those of a page."""
    check_plotting()
    from matplotlib import rc_context

    settings: Any = {**STYLE, **more}
    return rc_context(settings)


def png(figure: Any, title: str, dpi: int = 120) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    figure.suptitle(title, parse_math=False)  # a name may have dollars
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()


def inline_svg(draw: Callable[[Any], Sequence[Mark]], title: str, width: int, height: int) -> str:
    """An ``<svg>`` for a page; what ``draw`` says of the shapes it draws on the axes shows under the pointer.

    Args:
        title: read out in place of the figure; it tells its ids from those of the page's other figures.
        width, height: in pixels, where the text has 11.
    """
    image = io.BytesIO()
    with style(**{"svg.hashsalt": title}):
        figure = new_figure(width / 72, height / 72)  # matplotlib's unit of an SVG is a 72nd of an inch
        marks = {f"mark-{number}": mark for number, mark in enumerate(draw(figure.subplots()))}
        for name, (artist, _) in marks.items():
            artist.set_gid(name)
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(image.getvalue())
    for element in root.iter():
        # In HTML the names of SVG need no namespace.
        element.tag = _local(element.tag)
        element.text, element.tail = (element.text if element.tag == "text" else None), None
        element.attrib = {_local(name): value for name, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        if element.get("id") in marks:
            _explain(element, marks[element.attrib["id"]][1])
        if element.tag == "g" or element is root:
            element.attrib.pop("id", None)  # "axes_1" is in every figure
        if "style" in element.attrib:
            for colour, variable in VARIABLES.items():
                element.attrib["style"] = element.attrib["style"].replace(colour, f"var(--{variable})")
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _explain(group: Any, words: Sequence[str]) -> None:
    """Put a ``<title>`` into each shape of a group: the markers of a line, else all paths."""
    shapes = list(group.iter("use")) or list(group.iter("path"))
    for shape, text in zip(shapes, words, strict=True):
        ElementTree.SubElement(shape, "title").text = text

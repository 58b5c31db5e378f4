"""Bits of HTML: elements, tables, and pictures that stand in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure


def element(name: str, *inside: str, **attributes: str) -> str:
    """An element around markup; `class_` is the attribute class, and attribute values are escaped."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{''.join(inside)}</{name}>"


def text(name: str, words: str, **attributes: str) -> str:
    """An element around plain words."""
    return element(name, escape(words), **attributes)


def table(heads: Sequence[str], groups: Iterable[tuple[str, Sequence[Sequence[str]]]], label: str) -> str:
    """A table in groups of rows, each under a heading of its own (none where that is empty).

    It scrolls within the page where it is wider than that; the first column stays in sight.
    """
    head = element("thead", element("tr", *(text("th", word, scope="col") for word in heads)))
    bodies = []
    for heading, rows in groups:
        # Narrower than the table, so that it stays in sight too.
        over = text("th", heading, scope="rowgroup", colspan=str(len(heads)), class_="group")
        lines = [element("tr", over)] if heading else []
        for first, *others in rows:
            lines.append(element("tr", text("th", first, scope="row"), *(text("td", cell) for cell in others)))
        bodies.append(element("tbody", *lines))
    return element("div", element("table", head, *bodies), class_="wide", tabindex="0", role="region", aria_label=label)


def picture(figure: Figure, alt: str, number: str) -> str:
    """A figure as SVG within the page; `number` keeps its names apart from those of the page's other pictures.

    Words stay words, so that they can be searched and read aloud.
    """
    written = io.StringIO()
    words = matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    with words, matplotlib.rc_context({"svg.hashsalt": "polyserve", "savefig.dpi": 144}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    _, start, drawing = written.getvalue().partition("<svg")
    head, end, body = drawing.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{number}-", body)
    return f'{start} {box[0]} role="img" aria-label="{escape(alt)}"{end}{body.strip()}'


def swatch(hue: str, dash: Sequence[float], width: float) -> str:
    """A short piece of a line, for a legend."""
    dashes = f' stroke-dasharray="{" ".join(f"{each * width:g}" for each in dash)}"' if dash else ""
    return (
        '<svg viewBox="0 0 34 10" class="swatch" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="34" y2="5" stroke="{hue}" stroke-width="{width:g}"{dashes}/></svg>'
    )

"""Numbers and tables as text: quantities, Markdown, terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3}


def quantity(value: float) -> str:
    """Return a count with four significant digits and its unit: ``4.826G``, ``92.02M``, ``594.2K``."""
    for unit, size in UNITS.items():
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] = ()) -> str:
    """Return a Markdown table.

    Columns named in ``text`` (lower case; by default the first one) are aligned left, all others right.
    """
    text = text or {headings[0].lower()}
    rule = [":---" if heading.lower() in text else "---:" for heading in headings]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *cells))


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal: the first column aligned left, all others right."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if index else cell.ljust(width)
                               for index, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)

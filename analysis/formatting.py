"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] = ()) -> str:
    """Return a table; columns of text stand left, numbers right.

    ``text`` names the columns of text in lower case; the first column alone where it names none.
    """
    text = text or {headings[0].lower()}
    rule = [":---" if heading.lower() in text else "---:" for heading in headings]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *cells))

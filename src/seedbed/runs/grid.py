"""Rows of cells as aligned text or as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


def text_grid(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    least: Sequence[int | None],
    width: int | None = None,
) -> list[str]:
    """Lines of aligned text: the headings, then the rows.

    `least` has an entry a column: how narrow it may become where all does not fit in `width` characters, its cells
    cut; None for a column of numbers, which is never cut and stands to the right.
    """
    cells = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = _shrunk([max(map(len, column)) for column in zip(*cells, strict=True)], least, width)
    lines = []
    for row in cells:
        placed = [_place(cell, to, narrow) for cell, to, narrow in zip(row, widths, least, strict=True)]
        lines.append(GAP.join(placed).rstrip())
    return lines


def markdown_grid(headings: Sequence[str], rows: Sequence[Sequence[str]], least: Sequence[int | None]) -> list[str]:
    """Lines of a Markdown table; `least` as above says which columns are numbers."""
    rule = ["---:" if narrow is None else "---" for narrow in least]
    texts = [[_in_markdown(cell) for cell in row] for row in (headings, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in texts]


def printable(text: str) -> str:
    """Without control characters, which could write anywhere in a terminal, and on one line.

    >>> printable("a\\nb\\x1b[2J")
    'a b?[2J'
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def cut(text: str, width: int) -> str:
    """
    >>> cut("learning_rate", 8)
    'learn...'
    """
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."


def _shrunk(widths: list[int], least: Sequence[int | None], width: int | None) -> list[int]:
    """The widest column that may shrink gives a place, until all fits or none may."""
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width if width is not None else 0
    while excess > 0:
        able = [place for place, narrow in enumerate(least) if narrow is not None and widths[place] > narrow]
        if not able:
            break
        widths[max(able, key=widths.__getitem__)] -= 1
        excess -= 1
    return widths


def _place(cell: str, width: int, narrow: int | None) -> str:
    return cell.rjust(width) if narrow is None else cut(cell, width).ljust(width)


def _in_markdown(cell: str) -> str:
    return printable(cell).replace("\\", "\\\\").replace("|", "\\|")

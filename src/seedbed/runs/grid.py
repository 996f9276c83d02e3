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
    cut where they stay apart; None for a column of numbers, which is never cut and stands to the right.
    """
    columns = list(zip(*[[printable(cell) for cell in row] for row in (headings, *rows)], strict=True))
    widths = _shrunk([max(map(len, column)) for column in columns], least, width)
    placed = [_placed(column, to, narrow) for column, to, narrow in zip(columns, widths, least, strict=True)]
    return [GAP.join(row).rstrip() for row in zip(*placed, strict=True)]


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


def cut(text: str, width: int, tail: int = 0) -> str:
    """The text in `width` characters, the last `tail` of its own among them.

    >>> cut("learning_rate", 8), cut("learning_rate", 8, 2)
    ('learn...', 'lea...te')
    """
    left = max(0, width - 3)
    return text if len(text) <= width else f"{text[: left - min(tail, left)]}...{text[len(text) - min(tail, left) :]}"


def cut_apart(texts: Sequence[str], width: int) -> list[str]:
    """Each text cut at its end; in the middle, or at its beginning, where that keeps more of them apart.

    >>> cut_apart(["batch-4_seed-0", "batch-4_seed-1"], 12)
    ['batch...ed-0', 'batch...ed-1']
    >>> cut_apart(["learning_rate-0.1_seed-0", "learning_rate-0.2_seed-0"], 12)
    ['....1_seed-0', '....2_seed-0']
    """
    ways = [[cut(text, width, tail) for text in texts] for tail in (0, (width - 3) // 2, width)]
    return max(ways, key=lambda way: len(set(way)))


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


def _placed(column: Sequence[str], width: int, narrow: int | None) -> list[str]:
    if narrow is None:
        return [cell.rjust(width) for cell in column]
    return [cell.ljust(width) for cell in cut_apart(column, width)]


def _in_markdown(cell: str) -> str:
    return printable(cell).replace("\\", "\\\\").replace("|", "\\|")

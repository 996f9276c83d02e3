"""Aligned text and Markdown."""

from __future__ import annotations

from seedbed.runs.grid import markdown_grid, text_grid

HEADINGS = ("run", "loss", "notes")
ROWS = [("short", "1.5", "a note that is rather long"), ("a-longer-name", "12.25", "")]
LEAST = (10, None, 8)


def test_numbers_stand_to_the_right() -> None:
    assert text_grid(HEADINGS, ROWS, LEAST) == [
        "run             loss  notes",
        "short            1.5  a note that is rather long",
        "a-longer-name  12.25",
    ]


def test_long_texts_give_way_the_widest_first() -> None:
    lines = text_grid(HEADINGS, ROWS, LEAST, 36)
    assert lines[1] == "short            1.5  a note that..."
    lines = text_grid(HEADINGS, ROWS, LEAST, 10)
    assert lines == ["run          loss  notes", "short         1.5  a not...", "a-longe...  12.25"]


def test_nothing_writes_elsewhere_in_the_terminal() -> None:
    [_, line] = text_grid(["a"], [["x\x1b]0;title\x07\ny\u202e"]], [4])
    assert line == "x?]0;title? y?"
    assert markdown_grid(["a"], [["x|y\nz"]], [0])[2] == "| x\\|y z |"


def test_cells_that_begin_alike_are_cut_where_they_stay_apart() -> None:
    rates = [["learning_rate-0.001_seed-0"], ["learning_rate-0.005_seed-0"]]
    assert text_grid(["run"], rates, [10], 16)[1:] == ["...-0.001_seed-0", "...-0.005_seed-0"]
    seeds = [["learning_rate-0.001_seed-0"], ["learning_rate-0.001_seed-1"]]
    assert text_grid(["run"], seeds, [10], 16)[1:] == ["learnin...seed-0", "learnin...seed-1"]

"""What a person sees on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from seedbed.train.progress import Display

ODD = "models/[/b] [red]of[bold\\"


@pytest.mark.parametrize("terminal", [True, False])
def test_names_and_texts_are_shown_as_they_are(terminal: bool) -> None:
    """A folder may be called what rich takes for markup; a model may write it."""
    shown = io.StringIO()
    display = Display(Console(file=shown, force_terminal=terminal, width=200, color_system=None), 1)
    with display.working(f"Loading {ODD}"):
        pass
    with display.counting(f"Reading {ODD}") as report:
        report(1, 2)
    with display.counting_tokens(f"Measuring {ODD}", 2) as measured:
        measured(1)
    display.line(f"Saved {ODD}")
    display.sample(1, f"once upon {ODD}")
    for line in (f"Loading {ODD}", f"Measuring {ODD}", f"Saved {ODD}", f"Step 1 writes: once upon {ODD}"):
        assert line in shown.getvalue()
    assert (f"Reading {ODD}" in shown.getvalue()) == terminal

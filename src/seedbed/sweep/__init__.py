"""Many runs from one file: grids, lists and seeds, the worse ones stopped early, ending in a table."""

from seedbed.sweep.run import SweepResult, run_sweep

__all__ = ["SweepResult", "run_sweep"]

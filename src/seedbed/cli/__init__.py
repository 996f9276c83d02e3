"""The command line: verbs to functions, printing, exit codes. Imports torch only when a verb needs it."""

from seedbed.cli.app import main

__all__ = ["main"]

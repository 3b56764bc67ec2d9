"""The command line: one file a command or a family of commands. Importing it loads neither torch nor ray."""

from hfdist.cli.app import main

__all__ = ["main"]

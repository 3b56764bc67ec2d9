"""The command line: one file a verb or a family of verbs. Importing it loads neither torch nor ray."""

from hfdist.cli.app import main

__all__ = ["main"]

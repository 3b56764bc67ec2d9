"""Tasks: what is trained. `task.py` is the contract; each other file is one built-in problem."""

from hfdist.tasks.task import Task

__all__ = ["Task"]

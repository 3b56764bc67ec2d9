"""Who may write a run's files: the group of workers that started last.

A worker on a node that was cut off from its cluster, or suspended, does not know that the run continued
elsewhere; what it wrote into the shared folder would be mixed with what the others write.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from hfdist.checkpoint.storage import open_storage
from hfdist.errors import StorageError, SupersededError
from hfdist.rundir.files import LEASE
from hfdist.rundir.locations import is_address


class Lease:
    """The right to write, as a file of the run that names its holder.

    Args:
        output: Folder or address of the runs.
        run_id: The run.
    """

    def __init__(self, output: str | Path, run_id: str) -> None:
        self.is_cheap = not is_address(output)
        """Whether a check costs no request."""
        self._storage, self._run_id = open_storage(output), run_id
        self._mine = secrets.token_hex(8).encode()
        self._is_held = False

    def take(self) -> None:
        """Hold it from now on; the group that held it before will notice.

        Raises:
            StorageError: It cannot be written.
        """
        try:
            self._storage.write(self._run_id, LEASE, self._mine)
        except OSError as error:
            raise StorageError(f"cannot write the lease of run {self._run_id}: {error}") from error
        self._is_held = True

    def check(self) -> None:
        """Before something is written.

        Raises:
            SupersededError: Another group of workers goes on with the run.
        """
        if not self._is_held:
            return
        try:
            holder = self._storage.read(self._run_id, LEASE)
        except OSError:
            return  # what cannot be read now cannot be written either, and that has a message of its own
        if holder != self._mine:
            raise SupersededError(
                f"run {self._run_id} goes on in another group of workers: this one was declared dead "
                "and writes nothing more"
            )

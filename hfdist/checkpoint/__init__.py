"""Checkpoints: everything a run needs to go on exactly, written so that a reader sees all or nothing.

A checkpoint is a folder `NNNNNN-step-SSSSSSSS` (N counts the store's checkpoints, S is the step):

    tensors-R.safetensors   rank R's share of the tensors
    state.json              the nested state, with a reference where a tensor stands
    manifest.json           size and SHA-256 of every other file; written last

Nothing in it is executed on load: the tensors are safetensors, the rest is JSON. That, the checksums and one
commit by the manifest are why this is not torch.distributed.checkpoint, whose metadata is a pickle.
"""

from hfdist.checkpoint.identity import check, parameters_sha256
from hfdist.checkpoint.store import CheckpointStore
from hfdist.config.checkpoint import CheckpointConfig

__all__ = ["CheckpointConfig", "CheckpointStore", "check", "parameters_sha256"]

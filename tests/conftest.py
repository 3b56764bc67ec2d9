"""Makes the helpers beside this file (cases, dense, ..) importable from every test."""

from __future__ import annotations

import torch

# Tests share the cores with the processes that some of them start.
torch.set_num_threads(1)

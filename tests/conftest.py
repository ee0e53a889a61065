"""One torch thread: tests are small, and results must not depend on the machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

"""What torch loads with the first optimizer of a process, loaded by importing this: a second of work.

The pool's server imports it before it forks, so that no rank pays for it. Nothing else does.
"""

from __future__ import annotations

import torch

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

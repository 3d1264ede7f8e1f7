"""What torch loads with the first optimizer of a process, loaded by importing this: a second of work.

For `preload` of a pool (in pytest: `ranks_preload`) whose ranks train, so that they need not each pay for it.
Nothing else imports it.
"""

from __future__ import annotations

import torch

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

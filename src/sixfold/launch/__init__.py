"""The launch room: starts ranks, supervises them, and tells how they ended.

`discover` says whether this process is a rank already, `launch` starts ranks under torch elastic, and a
rank uses `worker_session`. It knows nothing of models or training; importing it loads no torch.
"""

from sixfold.launch.environment import NodePlacement, Placement, discover, host_names, nodes
from sixfold.launch.supervisor import launch
from sixfold.launch.worker import Session, current_session, worker_session

__all__ = [
    "NodePlacement",
    "Placement",
    "Session",
    "current_session",
    "discover",
    "host_names",
    "launch",
    "nodes",
    "worker_session",
]

"""Exchange between ranks of one host through memory that they share, in place of a network.

`Host.form` decides with all ranks whether that is possible; the mesh then takes its groups from it. It
needs Linux on x86-64 and no files, not even in /dev/shm: the memory has no name and ends with the last
process that maps it.
"""

from sixfold.mesh.host.common import Common
from sixfold.mesh.host.group import HostGroup
from sixfold.mesh.host.host import Host
from sixfold.mesh.host.scratch import SharedScratch

__all__ = ["Common", "Host", "HostGroup", "SharedScratch"]

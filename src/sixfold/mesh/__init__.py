"""Named axes, process groups, collectives and random streams; torch starts here.

Formed once by the engine and passed down; never global.
"""

from sixfold.mesh.agreement import agree
from sixfold.mesh.cut import Cut
from sixfold.mesh.dispatch import NOTHING, Carried, Dispatcher, Pending
from sixfold.mesh.group import Group
from sixfold.mesh.host import Host, HostGroup
from sixfold.mesh.link import Link, is_duplex
from sixfold.mesh.mesh import Mesh
from sixfold.mesh.pages import keep_pages, untouched_zeros
from sixfold.mesh.replicas import Replicas
from sixfold.mesh.scratch import Scratch
from sixfold.mesh.streams import Branch, Streams, key_of

__all__ = [
    "NOTHING",
    "Branch",
    "Carried",
    "Cut",
    "Dispatcher",
    "Group",
    "Host",
    "HostGroup",
    "Link",
    "Mesh",
    "Pending",
    "Replicas",
    "Scratch",
    "Streams",
    "agree",
    "is_duplex",
    "keep_pages",
    "key_of",
    "untouched_zeros",
]

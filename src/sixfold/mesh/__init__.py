"""Named axes, process groups, collectives and random streams; torch starts here.

Formed once by the engine and passed down; never global.
"""

from sixfold.mesh.mesh import Mesh, Pending
from sixfold.mesh.streams import Streams, key_of

__all__ = ["Mesh", "Pending", "Streams", "key_of"]

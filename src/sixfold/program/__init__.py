"""The step as data: instructions, schedules that write them, checks that read them.

Played by `pipeline`, priced by `plan`; knows no tensors, no devices and no ranks' contents.
"""

from sixfold.program.check import check
from sixfold.program.instructions import Instruction, Op, Program
from sixfold.program.schedules import accumulation, forward_only, rehearsal

__all__ = ["Instruction", "Op", "Program", "accumulation", "check", "forward_only", "rehearsal"]

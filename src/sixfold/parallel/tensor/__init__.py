"""The tensor axis: where its rules come from, what they cut, how layers cross it, and that they hold.

`axis.decide_tensor_axis` is what `parallel.axes` asks; styles are data, and everything else reads them.
"""

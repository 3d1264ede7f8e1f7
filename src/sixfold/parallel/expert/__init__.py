"""The expert axis: experts dealt out to ranks and tokens sent to them, and what their routers tell.

`axis.decide_expert` is what `parallel.axes` asks.
"""

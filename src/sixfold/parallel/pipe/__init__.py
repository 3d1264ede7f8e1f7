"""The pipe axis: the order of a model's parts, where it is cut into stages, what these cost and how they run.

`cut.ModelCut` is what the engine asks.
"""

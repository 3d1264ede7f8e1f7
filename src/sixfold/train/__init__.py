"""The training loop of `sixfold train`, its run folder and its callbacks.

Called by the command line. It drives the engine through the same faces every user has and reaches
into no room below it.
"""

"""Small readable reference models: plain torch, no collectives, nothing of the other rooms imported.

`sixfold train` builds the decoder; tests and benchmarks use it as the model that is fully known.
"""

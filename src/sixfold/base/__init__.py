"""The bottom room: errors, axis cards, units of measure.

Everything above may import it; it imports nothing of Sixfold and no tensor library.
"""

"""`python -m sixfold` is the command line, for torchrun and for machines without the entry point.

The launcher starts ranks of `sixfold train` through it. It is never imported.
"""

from sixfold.cli.app import main

main()

"""`python -m sixfold` is the command line."""

from sixfold.cli.app import main

main()

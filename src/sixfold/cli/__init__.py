"""The command line: the faces of Sixfold in a terminal.

`app` holds the commands and their help; each command's work is loaded when it is called, so that help
is instant. Nothing is computed here.
"""

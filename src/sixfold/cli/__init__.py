"""The command line. Each command's work is loaded when it is called, so that help is instant."""

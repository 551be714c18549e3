"""The commands, a file each: `train.py` is `spectral-window train`.

A file holds the command's options and their help, an example and the body (see `cli/program.py`).
To add a command, add a file.
"""

"""What the commands do, a file each: its `run` is called by the table in `cli.py`.

Results go to stdout, everything else to stderr.
"""

"""Writing text.

`session.py` goes on token by token in constant memory, `decoding.py` draws tokens and turns them
into characters, `session_file.py` keeps a conversation for later.
"""

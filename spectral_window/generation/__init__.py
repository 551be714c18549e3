"""Generation, from token ids to text.

engine        rows of token ids and their states: prefill, step, sample, copy, drop
decoding      from logits to text: sampling, a stream of characters, stop strings
session       one conversation: text around one row of an engine
session_file  its file
"""

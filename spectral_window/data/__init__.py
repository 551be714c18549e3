"""From a user's text to batches: text -> tokens -> packed blocks, resumable.

    sources.py     files, folders, Parquet, the standard library, a hub data set -> pieces of text
    formats.py     the readers below it: UTF-8, JSON lines, Parquet, compressed files
    tokenizers.py  bytes, bpe:N, gpt2 or a folder -> one kind of Hugging Face tokenizer
    holdout.py     which documents are kept for evaluation
    text.py        prepare(): pieces -> a folder of tokens;  open_corpus(): read it back
    shards.py      that folder: written whole or not at all
    blocks.py      tokens -> training examples, in a seeded and resumable order

Nothing here knows the model. Everything streams: memory does not grow with the text.
"""

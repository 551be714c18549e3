"""From a user's text to batches: text -> tokens -> packed blocks, resumable.

    sources.py     files, folders, Parquet, the standard library, a hub data set -> pieces of text
    kinds.py       what a file is, by its name: text, records, or refused with what to do
    formats.py     the readers below it: plain and compressed text
    records.py     and those of JSON, CSV, Parquet and the hub
    tokenizers.py  bytes, bpe:N, gpt2 or a folder -> one kind of Hugging Face tokenizer
    holdout.py     which documents are kept for evaluation
    text.py        prepare(): pieces -> a folder of tokens;  open_corpus(): read it back
    shards.py      that folder: written whole or not at all, verified when it is read
    arrays.py      its files as arrays: hashed when opened, and watched while in use
    blocks.py      tokens -> training examples, in a seeded and resumable order

Nothing here knows the model. Everything streams: memory does not grow with the text.
"""

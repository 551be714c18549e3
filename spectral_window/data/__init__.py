"""From text to training examples: text -> tokens -> packed blocks, resumable.

    sources.py     files, folders, Parquet, the standard library, a hub data set -> pieces of text
    kinds.py       the kind of a file by its name: text, records, or refused with advice
    formats.py     readers of plain and compressed text
    records.py     readers of JSON, CSV, Parquet and the hub
    tokenizers.py  bytes, bpe:N, gpt2 or a folder -> a byte-level Hugging Face tokenizer
    chat.py        conversations: their format, tokens and template
    holdout.py     the documents that are held out for evaluation
    sections.py    where the text may be divided, so that several processes read it
    passes.py      what is done with a section: survey, sample, tokens
    workers.py     processes that compute a function over many tasks
    text.py        prepare(): pieces -> a folder of tokens;  open_corpus(): open it
    shards.py      that folder: written atomically, verified when it is read
    remote.py      that folder on an object store, read through a cache
    arrays.py      its files as arrays: hashed when opened, and checked while in use
    blocks.py      tokens -> training examples, in a seeded and resumable order
    tasks/         diagnostic tasks with synthetic data

Nothing here depends on the model. All text is streamed: memory does not grow with its size.
"""

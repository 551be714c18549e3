"""A model behind the OpenAI HTTP interface: `spectral-window serve`.

    server      the process: a socket, signals, uvicorn
    app         HTTP: routes, keys, limits, errors, the page
    metrics     what /metrics shows
    service     from a request to texts to write, and from their pieces to an answer
    protocol    the shapes of requests and answers, no model and no HTTP
    sessions    named sessions: a file each
    scheduler   continuous batching: one thread that owns the engine
    prefixes    states after the beginnings of prompts, shared between requests
    page.*      the page at /

A request crosses three threads. The event loop (`app`) never computes: a helper thread turns text
into ids and opens sessions, the scheduler's thread runs the model, and pieces of text come back to
the loop, once for all rows of a step.
"""

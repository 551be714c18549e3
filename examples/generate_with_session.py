"""Generate text, save the session, and go on in another process with the text it would have had.

    python examples/generate_with_session.py runs/mine story.session "Once upon a time"
    python examples/generate_with_session.py runs/mine story.session

The file holds the state of the model, a few hundred kB whatever the length of the text before.
"""

import sys
from pathlib import Path

from spectral_window.generation.session import Session
from spectral_window.training.loading import load


def main(model_folder: str, file: str, prompt: str = "", tokens: str = "100") -> None:
    loaded = load(model_folder)
    if Path(file).exists():
        session = Session.load(file, loaded.model, loaded.tokenizer)
    else:
        session = Session(loaded.model, loaded.tokenizer, seed=7)
    if prompt:
        session.feed(prompt)
    # finish=False: half of a character at the end waits for the next time
    for piece in session.stream(int(tokens), temperature=0.8, finish=False):
        print(piece, end="", flush=True)
    session.save(file)
    print(f"\n[{session.tokens_seen:,} tokens so far, saved in {file}]")


if __name__ == "__main__":
    main(*sys.argv[1:])

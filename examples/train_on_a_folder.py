"""Train the recommended model on a folder of text, and measure it.

    python examples/train_on_a_folder.py books/ runs/books
    python examples/train_on_a_folder.py books/ runs/books steps=200 lr=1e-3

What `spectral-window train memory --data books/ --out runs/books` does, from Python. It can be
stopped by Ctrl-C; `train(recipe, out, resume=True)` goes on.
"""

import sys

from spectral_window.training import train
from spectral_window.training.recipes import resolve


def main(folder: str, out: str, *overrides: str) -> None:
    recipe = resolve("memory", [f"data={folder}", *overrides])
    result = train(recipe, out)
    print(f"{result['parameters']:,} parameters read {result['tokens']:,} tokens")
    print(f"held-out loss {result['eval_loss']:.3f} nats per token, in {out}/model")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Generate with ONNX Runtime alone, from what `spectral-window export RUN --out DIR` wrote.

python examples/generate_onnx.py DIR "Once upon a time" 50
"""

import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(folder: str, prompt: list[int], count: int) -> list[int]:
    """Continue `prompt` by the `count` most likely tokens, one after the other."""
    prefill = onnxruntime.InferenceSession(f"{folder}/prefill.onnx")
    step = onnxruntime.InferenceSession(f"{folder}/step.onnx")
    names = [each.name for each in step.get_inputs()]
    ids = np.array([prompt], dtype=np.int64)
    positions = np.arange(len(prompt), dtype=np.int64)[None]
    logits, *states = prefill.run(None, {"input_ids": ids, "positions": positions})
    written = []
    for _ in range(count):
        token = logits[:, -1:].argmax(-1)
        written.append(int(token[0, 0]))
        logits, *states = step.run(None, dict(zip(names, (token, *states), strict=True)))
    return written


if __name__ == "__main__":
    folder, text, count = sys.argv[1:]
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    print(text + tokenizer.decode(generate(folder, prompt, int(count))))

"""Prefer one answer to another by TRL's DPOTrainer.

    pip install 'spectral-window[tune]'
    python examples/finetune_dpo.py runs/chat/model pairs.jsonl runs/dpo

A line of the file is {"prompt": [messages], "chosen": [a message], "rejected": [a message]}, or has
three texts.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import spectral_window  # noqa: F401  makes "swh" known to transformers


def main(model_folder: str, pairs_file: str, out: str, steps: str = "50") -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    arguments = DPOConfig(
        output_dir=out,
        max_length=256,
        max_steps=int(steps),
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    data = load_dataset("json", data_files=pairs_file, split="train")
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
    print(f"margin between the answers {margins[0]:.3f}, at the end {margins[-1]:.3f}")
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Teach a model to answer by TRL's SFTTrainer: packed rows, without padding, on answers alone.

    pip install 'spectral-window[tune]'
    python examples/finetune_sft.py runs/chat/model messages.jsonl runs/sft

The model is one of `train --chat`, whose tokenizer has a chat template. A line of the file is
{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import spectral_window  # noqa: F401  makes "swh" known to transformers


def main(model_folder: str, messages_file: str, out: str, steps: str = "50") -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    arguments = SFTConfig(
        output_dir=out,
        max_length=256,
        packing=True,  # conversations share a row, and the model keeps them apart
        assistant_only_loss=True,
        max_steps=int(steps),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    data = load_dataset("json", data_files=messages_file, split="train")
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    print(f"mean loss {trainer.train().training_loss:.3f}")
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Fine-tune a trained model on other text with LoRA, by Hugging Face's Trainer and PEFT.

    pip install peft
    python examples/finetune_lora.py runs/mine/model letter.txt runs/letters

Only small matrices beside the projections are trained; what is saved is those, a few hundred kB.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import spectral_window  # noqa: F401  makes "swh" known to transformers

BLOCK = 128  # tokens in one example


def main(model_folder: str, text_file: str, out: str, steps: str = "50") -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    targets = ["q_proj", "v_proj", "local_proj", "out_proj"]
    model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    ids = tokenizer(Path(text_file).read_text(encoding="utf-8"))["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=10,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model=model, args=arguments, train_dataset=examples).train()
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

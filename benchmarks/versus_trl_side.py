"""TRL's side of versus_trl.py: one DistillationTrainer, in the environment that has TRL.

    python versus_trl_side.py ORDER.json

ORDER.json names the models, the prompts and the recipe, and the files for the trained model and the
figures. This file imports nothing of lopd.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()

import torch  # noqa: E402  # the clock begins before the imports
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402


def main(order: dict[str, object]) -> None:
    """Train, save the model, and write the figures."""
    torch.set_num_threads(int(str(order["threads"])))
    out = Path(str(order["out"]))
    tokenizer = AutoTokenizer.from_pretrained(order["student"])
    student = AutoModelForCausalLM.from_pretrained(order["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(order["teacher"], dtype=torch.float32)
    teacher_tokens = [0]

    def count(
        module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        teacher_tokens[0] += int((ids != tokenizer.pad_token_id).sum())

    teacher.model.register_forward_pre_hook(count, with_kwargs=True)
    settings = DistillationConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=order["batch_size"],
        gradient_accumulation_steps=1,
        max_steps=order["num_steps"],
        learning_rate=order["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_completion_length=order["max_new_tokens"],
        temperature=1.0,
        # The reverse KL over the whole vocabulary.
        beta=1.0,
        seed=order["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=Dataset.from_list(order["prompts"]),
        processing_class=tokenizer,
    )
    ready = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    trainer.model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    figures = {
        "start_s": ready - BEGAN,
        "work_s": trained - ready,
        "rollouts": int(str(order["batch_size"])) * int(str(order["num_steps"])),
        "teacher_tokens": teacher_tokens[0],
    }
    (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""TRL's SFTTrainer on the bench's rows, as shipped and with its compact output head forced on.

**The one monkeypatch.** Where Triton exists, TRL projects only the supervised positions through the output
head; elsewhere it projects every position, which on CPU about halves its speed. The choice is the local
variable ``compact`` of ``_fused_forward`` in ``trl/trainer/utils.py`` (`add_fused_lm_head`): whatever that
module's ``_use_triton`` answers. `force_compact_head` rebinds that name in this child process. The kernel's
module has a binding of its own, so the tiles are still folded by TRL's torch code, and losses stay the same.

Precision follows TRL: ``bf16=True`` is autocast over fp32 weights. Gradient checkpointing, on by default in
SFTConfig, is slower and smaller: off here, on in the contenders named ``…-checkpointing``.
"""

import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from bench.job import Job, Measurement, answer, measure


def force_compact_head() -> None:
    """Make TRL score supervised positions only, without Triton (see the module's docstring)."""
    if "_use_triton" not in trl_utils.add_fused_lm_head.__globals__:
        raise RuntimeError("this TRL chooses its compact head differently: update bench/peers/trl_sft.py")
    trl_utils._use_triton = lambda device: True


class Stopwatch(TrainerCallback):
    """Notes when every step ended, in seconds since training began, and its loss."""

    def __init__(self) -> None:
        self.began = 0.0
        self.step_ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        self.step_ends.append(time.perf_counter() - self.began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the loss, unrounded; the last log holds the run's totals instead."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def options(job: Job) -> dict[str, Any]:
    """Return the options that every contender and method shares, in TRL's words."""
    return {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": job.epochs,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm,
        "bf16": job.precision == "bf16",
        "gradient_checkpointing": job.contender.endswith("-checkpointing"),
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job.seed,
    }


def load(job: Job) -> PreTrainedModel:
    """Return the model in fp32, or quantised."""
    return AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, quantization_config=quantisation(job)
    )


def begin(job: Job) -> None:
    """Set threads, seed and the head before anything else is done."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    if not job.contender.startswith("trl-shipped"):
        force_compact_head()


def lora_config(job: Job) -> LoraConfig:
    """Return the adapter, in PEFT's words."""
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=list(job.targets),
        use_dora=job.adapter == "dora",
        task_type="CAUSAL_LM",
    )


def quantisation(job: Job) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' NF4 as QLoRA has it, or nothing."""
    if job.quantiser == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quantiser,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if job.precision == "bf16" else torch.float32,
    )


def tokenised(job: Job) -> Dataset:
    """Return the rows in TRL's tokenised format."""
    rows = []
    for row in job.encoded():
        completion = len(row["input_ids"]) - row["prompt_length"]
        mask = [0] * row["prompt_length"] + [1] * completion
        rows.append({"input_ids": row["input_ids"], "completion_mask": mask})
    return Dataset.from_list(rows)


def run(job: Job) -> Measurement:
    """Train one epoch."""
    begin(job)
    stopwatch = Stopwatch()
    trainer = SFTTrainer(
        model=load(job),
        args=SFTConfig(**options(job), completion_only_loss=True, packing=False),
        train_dataset=tokenised(job),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
        callbacks=[stopwatch],
    )
    expected = [row["input_ids"] for row in job.encoded()]
    if [row["input_ids"] for row in trainer.train_dataset] != expected:
        raise RuntimeError("TRL changed the token ids")
    trainer.train()
    return measure(job, stopwatch.step_ends, stopwatch.losses)


if __name__ == "__main__":
    answer(run)

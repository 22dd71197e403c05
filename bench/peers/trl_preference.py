"""TRL's DPOTrainer and KTOTrainer on the bench's rows.

Both use the output head that `bench.peers.trl_sft` describes, so the same monkeypatch makes it compact. Their
preparation of data is passed over: the rows are tokenised already, and those of KTO carry the completions of
other rows that every contender takes. Where a contender's name ends in ``-precomputed``, the reference is
measured before training and timed apart.
"""

import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from bench.job import Job, Measurement, answer, measure
from bench.peers.trl_sft import Stopwatch, begin, load, lora_config, options


class _Prepared:
    """Takes tokenised rows as they are; notes how long a reference pass takes."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
        began = time.perf_counter()
        found = super()._precompute_ref_logps(*arguments)  # type: ignore[misc]
        self.reference_seconds = time.perf_counter() - began
        return found


class PreparedDPO(_Prepared, DPOTrainer):
    """DPOTrainer on tokenised rows."""


class PreparedKTO(_Prepared, KTOTrainer):
    """KTOTrainer on tokenised rows with their mismatched completions."""


TRAINERS = {"dpo": (PreparedDPO, DPOConfig), "kto": (PreparedKTO, KTOConfig)}


def tokenised(job: Job) -> Dataset:
    """Return the rows in the tokenised format of the method's trainer."""
    encoded = job.encoded()
    cut = [
        (one["input_ids"][: one["prompt_length"]], one["input_ids"][one["prompt_length"] :])
        for one in encoded
    ]
    columns = (
        ("chosen_ids", "rejected_ids") if job.method == "dpo" else ("completion_ids", "KL_completion_ids")
    )
    rows: list[dict[str, Any]] = []
    for (prompt, first), (same, second) in zip(cut[::2], cut[1::2], strict=True):
        if prompt != same:
            raise ValueError(f"row {len(rows) + 1}: its completions have different prompts")
        rows.append({"prompt_ids": prompt, columns[0]: first, columns[1]: second})
    if job.method == "kto":
        for row, line in zip(rows, Path(job.rows).read_text(encoding="utf-8").splitlines(), strict=True):
            row["label"] = json.loads(line)["label"]
    return Dataset.from_list(rows)


def trainer_of(job: Job, callbacks: list[TrainerCallback]) -> PreparedDPO | PreparedKTO:
    """Return a trainer whose adapter has the weights of `Job.start`; a reference pass is done."""
    begin(job)
    trainer_class, config_class = TRAINERS[job.method]
    precomputed = job.contender.endswith("-precomputed")
    trainer = trainer_class(
        model=load(job),
        args=config_class(**options(job), beta=job.beta, precompute_ref_log_probs=precomputed),
        train_dataset=tokenised(job),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
        callbacks=callbacks,
    )
    unknown = set_peft_model_state_dict(
        trainer.model, load_peft_weights(job.start, device="cpu")
    ).unexpected_keys
    if unknown:
        raise RuntimeError(f"PEFT does not know the adapter's weights: {unknown[:3]}")
    return trainer


def run(job: Job) -> Measurement:
    """Measure the reference, where it is precomputed, and train."""
    stopwatch = Stopwatch()
    trainer = trainer_of(job, [stopwatch])
    trainer.train()
    return measure(job, stopwatch.step_ends, stopwatch.losses, trainer.reference_seconds)


if __name__ == "__main__":
    answer(run)

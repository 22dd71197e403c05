"""Does a run's adapter answer in ``peft`` as it does in Luthier? ``python -m bench.same_answers RUN``.

Both load the run's ``model/`` folder on the base in fp32 and answer the run's held-out prompts greedily, one
at a time, each with its own code.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier import Codec, ModelPolicy
from luthier.config import ModelConfig, build, prepare
from luthier.evaluation import EvaluationConfig, greedy
from luthier.models import load_model


def peft_answers(folder: Path, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Answer with transformers and peft alone."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return answers


def main() -> None:
    """Compare, print, and exit with 1 if an answer differs."""
    parser = argparse.ArgumentParser(description="Compare a run's adapter in Luthier and in peft.")
    parser.add_argument("run", type=Path, help="a run folder of an adapter trained with eval_data")
    parser.add_argument("--rows", type=int, default=100, help="held-out prompts to answer")
    options = parser.parse_args()
    prepare()
    config = OmegaConf.load(options.run / "config.yaml")
    loaded = load_model(ModelConfig(path=str(options.run / "model"), dtype="float32"), train_base=False)
    codec = Codec(loaded.tokenizer)
    rows = list(build("data_source", config.eval_data).rows())[: options.rows]
    prompts = [codec.prompt_ids(row.fields["prompt"]) for row in rows]
    settings = EvaluationConfig(max_new_tokens=config.evaluation.max_new_tokens, batch_size=1)
    ours = [answer.said for answer in greedy(ModelPolicy(loaded.model), codec, prompts, settings)]
    theirs = peft_answers(options.run / "model", prompts, settings.max_new_tokens)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{same} of {len(ours)} answers are the same in luthier and peft, e.g. {ours[:5]} and {theirs[:5]}")
    sys.exit(same != len(ours))


if __name__ == "__main__":
    main()

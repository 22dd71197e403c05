"""Faults A7, B8 and B10 end to end: ends that are taught are known everywhere, and chats are answered."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import BOS, END, save_tiny, tiny_tokenizer, write_rows
from luthier import DataError, compose, evaluate, train
from luthier_plugins.commands.preview import preview

CHATS = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
    for a, b in zip("abcd", "bcde", strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose texts end with another token than the turns of its chat template."""
    path = tmp_path_factory.mktemp("ends")
    save_tiny(path / "base", bos_token_id=0, eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(path / "base")
    tokenizer.eos_token = BOS
    tokenizer.save_pretrained(path / "base")
    write_rows(path / "rows.jsonl", CHATS)
    return path


def overrides(folder, run_dir, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "data@eval_data=jsonl", f"eval_data.path={folder}/rows.jsonl", "evaluation.max_new_tokens=6",
        "optimiser.lr=2e-2", "batch_size=4", "epochs=40", f"run_dir={run_dir}", "tracker=[]", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_end_that_was_taught_ends_answers_here_and_in_plain_transformers(folder, tmp_path, adapter):
    held = [
        {"messages": [{**turn, "content": turn["content"] + " "} for turn in row["messages"]]}
        for row in CHATS
    ]
    write_rows(tmp_path / "held.jsonl", held)
    result = train(compose("train", [*overrides(folder, tmp_path / "run", f"adapter={adapter}"),
                                     f"eval_data.path={tmp_path}/held.jsonl"]))  # fmt: skip
    # B8: rows of messages are answered and scored.
    assert [sample.expected for sample in result.after.samples] == [f"{letter} " for letter in "bcde"]
    assert result.after.scored == 4
    model = result.run_dir / "model"
    told = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.convert_tokens_to_ids(END) in told
    if adapter == "lora":  # of a random base it learns too little to answer right
        return
    again = evaluate(compose("evaluate", [f"model.path={result.run_dir}", "model.dtype=float32", "data=jsonl",
                                          f"data.path={folder}/rows.jsonl"]))  # fmt: skip
    assert again.accuracy == 1.0
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        CHATS[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = plain.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(made) == f"b{END}"


def test_the_preview_of_an_end_that_turns_have_is_no_alarm(folder, tmp_path):
    config = compose("preview", [*overrides(folder, tmp_path / "run"), "eval_data=null", "html=null"])
    (ends,) = [finding for finding in preview(config).findings if finding.label == "ends"]
    assert ends.text == f"end token '{END}' is trained in 4 of 4 completions"
    assert not ends.wrong


@pytest.mark.parametrize("command", ["train", "preview"])
def test_a_token_without_a_row_of_the_embedding_is_one_line(folder, tmp_path, command):
    save_tiny(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(
        tmp_path / "rows.jsonl",
        [*CHATS, {"messages": [{"role": "user", "content": "<|call|>"}, *CHATS[0]["messages"][1:]]}],
    )
    config = compose(command, ["model.dtype=float32", f"model.path={tmp_path}/base", "data=jsonl",
                               f"data.path={tmp_path}/rows.jsonl", f"run_dir={tmp_path}/run"])  # fmt: skip
    with pytest.raises(
        DataError, match=r"rows.jsonl:5: the token '<\|call\|>' is number .* set model.resize=true"
    ):
        (train if command == "train" else preview)(config)

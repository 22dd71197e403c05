"""Options that have a new name: the old one is answered with it, and runs of before still have theirs."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from luthier import ConfigError, compose
from luthier.runs.resume import check_config

RENAMED = json.loads((Path(__file__).parents[3] / "bench" / "renamed.json").read_text(encoding="utf-8"))
WORDS = ["model.path=base", "data=jsonl", "data.path=rows.jsonl", "run_dir=run"]
PPO = [*WORDS, "objective=ppo", "reward_model=[length]"]


@pytest.mark.parametrize("old", RENAMED)
def test_the_old_name_is_answered_with_the_new_one(old):
    with pytest.raises(ConfigError, match=rf"did you mean '{RENAMED[old]}'"):
        compose("train", [*PPO, f"{old}=1"])


def test_a_name_that_another_method_has_is_not_suggested_for_it():
    with pytest.raises(ConfigError, match=r"nothing reads 'objective\.clip': known: name, supervise"):
        compose("train", [*WORDS, "++objective.clip=2"])


@pytest.mark.parametrize("old", RENAMED)
def test_a_run_of_before_the_new_name_is_the_same_run(old):
    config = compose("train", PPO)
    before = OmegaConf.to_container(config, resolve=True)
    *path, name = old.split(".")
    holder = before[path[0]] if path else before
    holder[name] = holder.pop(RENAMED[old].split(".")[-1])
    assert check_config(config, OmegaConf.to_yaml(OmegaConf.create(before)), Path("run")) == {}

"""What is suggested for an option that there is not (faults.md E: "did you mean 'lr'?")."""

import json

import pytest

from luthier import ConfigError, compose
from luthier.config import prepare
from luthier.config.composition import known_keys
from luthier.config.hydra_errors import SYNONYMS

DATA = ["model.path=base", "data=jsonl", "data.path=rows.jsonl"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "optimiser.lr"),
        ("optimizer.lr", "optimiser.lr"),
        ("learning_rate", "optimiser.lr"),
        ("optimiser.learning_rate", "optimiser.lr"),
        ("r", "adapter.rank"),
        ("adapter.r", "adapter.rank"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("rnk", "adapter.rank"),
        ("num_train_epochs", "epochs"),
        ("evaluation.max_tokens", "evaluation.max_new_tokens"),
        ("load_in_4bit", "quantiser=nf4"),
        ("pack_tokns", "pack_tokens"),
    ],
)
def test_the_suggestion_is_the_whole_name(typed, meant):
    with pytest.raises(ConfigError, match=rf"^unknown option '{typed}': did you mean '{meant}'\?$"):
        compose("train", [*DATA, f"{typed}=1"])


def test_a_name_that_several_have_shows_them():
    with pytest.raises(ConfigError, match=r"did you mean 'data\.path' or 'model\.path'\?$"):
        compose("train", [*DATA, "path=1"])


def test_the_synonyms_lead_to_what_there_is():
    prepare()
    known = {key for verb in ("train", "merge") for key in known_keys(verb)} | {"data@eval_data"}
    meant = json.loads(SYNONYMS.read_text())
    assert {name for name in meant.values() if name.rpartition("=")[0] or name not in known} == {
        name for name in meant.values() if "=" in name and name.rpartition("=")[0] in known
    }
    assert not meant.keys() & known

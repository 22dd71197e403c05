"""Problems from reasoning-gym: reproducible, held out by another seed, verified by the task."""

import pytest

from luthier import ConfigError
from luthier_plugins.data_sources.reasoning_gym import ReasoningGym


def source(**options):
    return ReasoningGym(**{"task": "chain_sum", "size": 20, **options})


def questions(**options):
    return [row.fields["prompt"][-1]["content"] for row in source(**options).rows()]


def test_a_seed_draws_the_same_problems_and_the_held_out_split_others():
    assert questions() == questions()
    assert len(set(questions()) & set(questions(split="held_out"))) < 5
    assert questions(seed=1) != questions()


def test_rows_are_chat_messages_or_text():
    row = next(source(system="Be brief.").rows())
    assert [message["role"] for message in row.fields["prompt"]] == ["system", "user"]
    assert row.fields["completion"][0]["role"] == "assistant"
    plain = next(source(chat=False).rows())
    assert plain.fields["prompt"] == row.fields["prompt"][-1]["content"]
    assert plain.origin == "chain_sum[0]"


def test_the_tasks_own_verifier_decides():
    gym = source(options={"min_terms": 2, "max_terms": 2})
    for row in gym.rows():
        right = row.fields["completion"][0]["content"]
        assert gym.verify(row, right) == 1.0
        assert gym.verify(row, f"{int(right) + 1}") < 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "chain_sums"}, r"unknown task 'chain_sums': did you mean 'chain_sum'"),
        ({"options": {"max_term": 3}}, r"task chain_sum refuses its options .*max_term"),
        ({"options": {"min_terms": 5, "max_terms": 2}}, r"task chain_sum refuses its options"),
    ],
)
def test_unknown_tasks_and_options_are_told(options, told):
    with pytest.raises(ConfigError, match=told):
        list(source(**options).rows())

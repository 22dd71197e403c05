"""Online training: the first ratio is one, a known optimum is reached, one base serves all, exact resume."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from conforming import words
from helpers import StopAt, crash, save_tiny, write_rows
from luthier import ConfigError, DataError, GuardError, Pack, compose, train
from luthier.engine.loop import Loop
from luthier.models.model import load_model
from luthier_plugins.objectives.ppo.ppo import PPO
from luthier_toolkits.online import rollouts
from luthier_toolkits.online.rollout_file import RolloutFiles
from luthier_toolkits.rewards.network import RewardNetwork

pytestmark = pytest.mark.slow

assert words
assert StopAt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("online")
    save_tiny(path / "base")
    letters = "abcdefgh"
    write_rows(path / "rows.jsonl", [{"prompt": f"{a} then", "completion": a} for a in letters])
    write_rows(path / "held.jsonl", [{"prompt": f"{a} and", "completion": a} for a in "xy"])
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in letters]
    write_rows(path / "reward.jsonl", pairs)
    return path


LONG = ("reward_model=[length]", "reward_models.length.per_token=-1")
"""A token is worth one."""
SAME = ("reward_model=[length]", "reward_models.length.per_token=0")


def rewarded(overrides):
    return any(one.startswith("reward_model=") for one in overrides)


def given(folder, run, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "objective=ppo", "objective.rollout_batch_size=4", "objective.samples_per_prompt=2",
        "objective.max_new_tokens=5",
        "objective.rollout_epochs=2", "batch_size=2", "epochs=2", "optimiser.lr=1e-2", "log_every=1",
        "tracker=[metrics]", f"run_dir={run}", *(more if rewarded(more) else (*LONG, *more)),
    ]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run):
    return [line["metrics"] for line in lines(run / "metrics.jsonl")]


def weights(run):
    return load_file(run / "model" / "adapter_model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_every_rollout_is_kept_and_its_steps_are_counted(folder, tmp_path):
    result = train(compose("train", given(folder, tmp_path / "run")))
    # 8 prompts, 4 a rollout: two rollouts an epoch, each of 2 passes over 2 batches of 2.
    assert result.steps == 16
    kept = sorted(path.name for path in (tmp_path / "run/rollouts").iterdir())
    assert kept == [f"0000000{n}.{kind}" for n in range(4) for kind in ("jsonl", "safetensors")]
    told = lines(tmp_path / "run/rollouts/00000000.jsonl")
    assert len(told) == 8
    assert [line["score"] for line in told] == [float(line["tokens"]) for line in told]
    metrics = metrics_of(tmp_path / "run")
    assert metrics[0]["reward"] == pytest.approx(sum(line["score"] for line in told) / 8)
    assert metrics[0]["length"] == metrics[0]["reward"]
    assert metrics[0]["finished"] == sum(line["finished"] for line in told) / 8
    assert {"kl", "entropy", "clip_fraction", "value_loss", "explained_variance", "right"} <= metrics[
        0
    ].keys()
    assert not any("score_head" in name for name in weights(tmp_path / "run"))


def test_the_first_ratio_is_one_and_the_reference_is_where_training_starts(folder, tmp_path, monkeypatch):
    seen = []

    def watch(self, policy, pack):
        with torch.no_grad():
            now = policy.logprobs(pack).values
        old, reference = pack.notes("logprob"), pack.notes("reference")
        seen.append(
            ((now - old).abs().max().item(), (old - reference).abs().max().item(), pack.notes("value"))
        )
        return loss(self, policy, pack)

    loss = PPO.loss
    tuned = [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "max_steps=6", "batch_size=4", "optimiser.lr=2e-2", "tracker=[]", f"run_dir={tmp_path}/tuned",
    ]  # fmt: skip
    train(compose("train", [*tuned, "adapter.dropout=0.3"]))
    monkeypatch.setattr(PPO, "loss", watch)
    from_it = (f"model.path={tmp_path}/tuned", "adapter.dropout=0.3", "pack_tokens=24", "schedule.warmup=0")
    train(compose("train", given(folder, tmp_path / "run", *from_it)))
    ratio, apart, value = seen[0]
    assert math.expm1(ratio) < 1e-6
    assert apart < 1e-6
    assert (value == 0).all()  # advantages begin as what came of the answers
    assert seen[-1][0] > 1e-3
    assert seen[-1][1] > 1e-3


def test_a_known_optimum_is_reached(folder, tmp_path):
    """One token an answer: max E[r] − β·KL is β·log E_ref[exp(r/β)], where π ∝ π_ref·exp(r/β)."""
    write_rows(tmp_path / "one.jsonl", [{"prompt": "a then", "completion": "a"}] * 1)
    beta, run = 0.25, tmp_path / "run"
    train(compose("train", [
        *given(folder, run, "reward_model=[verifier]", "reward_models.verifier.match=pattern"),
        r"reward_models.verifier.pattern='^\s*[a-m]'", "reward_models.verifier.unfinished=null",
        f"data.path={tmp_path}/one.jsonl", "objective.max_new_tokens=1", "objective.samples_per_prompt=128",
        "objective.rollout_batch_size=1", "batch_size=1", "objective.rollout_epochs=2",
        f"objective.kl_coefficient={beta}",
        "epochs=40", "adapter=full", "optimiser.lr=5e-3", "log_every=20",
    ]))  # fmt: skip

    def distribution(path):
        loaded = load_model(
            compose("train", given(folder, run, f"model.path={path}")).model, train_base=False
        )
        ids = loaded.tokenizer("a then", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return loaded.model(ids).logits[0, -1].double().log_softmax(-1), loaded.tokenizer

    reference, tokenizer = distribution(folder / "base")
    texts = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(len(reference))]
    reward = torch.tensor([float(text[:1] in list("abcdefghijklm")) for text in texts], dtype=torch.float64)

    def worth(policy):
        return float((policy.exp() * (reward - beta * (policy - reference))).sum())

    optimum = beta * math.log(float((reference.exp() * (reward / beta).exp()).sum()))
    start, end = worth(reference), worth(distribution(run / "model")[0])
    assert start < 0.4 * optimum
    assert end > 0.97 * optimum
    assert end <= optimum + 1e-9


@pytest.mark.parametrize("step", [2, 4, 6], ids=["in a rollout", "between two", "in the second"])
def test_what_was_killed_goes_on_bit_by_bit(folder, tmp_path, step):
    adapted_kl_coefficient = ("objective.kl_target=0.5", "objective.kl_horizon=50", "checkpoint.every=1")
    train(compose("train", given(folder, tmp_path / "whole", *adapted_kl_coefficient)))
    crash(given(folder, tmp_path / "run", *adapted_kl_coefficient), step=step + 1)
    result = train(compose("train", [f"resume={tmp_path}/run"]))
    assert result.steps == 16
    same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    told = [metrics_of(tmp_path / run) for run in ("run", "whole")]
    timed = {"seconds/answering", "seconds/rollout"}
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys() >= timed
        assert {k: one[k] for k in one.keys() - timed} == {k: other[k] for k in one.keys() - timed}
    for number in range(4):
        files = [RolloutFiles(tmp_path / run / "rollouts").read(number) for run in ("run", "whole")]
        assert files[0].rollout == files[1].rollout
        assert files[0].state == files[1].state


def test_a_rollout_that_is_gone_is_named(folder, tmp_path):
    crash(given(folder, tmp_path / "run", "checkpoint.every=1"), step=3)
    (tmp_path / "run/rollouts/00000000.safetensors").unlink()
    with pytest.raises(Exception, match=r"00000000.safetensors: the rollout that the checkpoint belongs to"):
        train(compose("train", [f"resume={tmp_path}/run"]))


def test_a_reward_model_on_the_same_base_shares_it(folder, tmp_path, monkeypatch):
    train(compose("train", [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/reward.jsonl",
        "objective=reward", "max_steps=2", "batch_size=4", "tracker=[]", f"run_dir={tmp_path}/reward",
    ]))  # fmt: skip
    judges, models = [], []
    ends = RewardNetwork.ends
    monkeypatch.setattr(RewardNetwork, "ends", lambda self, found: judges.append(self) or ends(self, found))
    made = Loop.__post_init__
    monkeypatch.setattr(Loop, "__post_init__", lambda self: models.append(self.policy.model) or made(self))
    outcome = ("reward_model=[outcome]", f"reward_models.outcome.model={tmp_path}/reward", "epochs=1")
    train(compose("train", given(folder, tmp_path / "run", *outcome)))
    assert judges
    assert all(judge.policy.model is models[0] for judge in judges)
    alone = RewardNetwork.ends(judges[0], [])
    assert alone.shape == (0,)


def test_training_whole_compares_with_a_copy(folder, tmp_path):
    train(compose("train", given(folder, tmp_path / "run", "adapter=full", "optimiser.lr=1e-3")))
    told = metrics_of(tmp_path / "run")
    assert told[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(told[-1]["kl"]) > 1e-3


def test_a_guard_keeps_a_checkpoint_and_says_why(folder, tmp_path):
    options = given(folder, tmp_path / "run", "objective.max_reward=0.5", "objective.max_kl=null")
    with pytest.raises(GuardError, match=r"objective.max_reward=0.5: the policy exploits its reward"):
        train(compose("train", options))
    run = tmp_path / "later"
    flips = iter([0.0, 0.0, 9.0])
    credit = PPO.credit

    def rising(self, rollout, state):
        self._guard(0.0, next(flips))
        return credit(self, rollout, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "credit", rising)
        with pytest.raises(GuardError):
            train(compose("train", given(folder, run, "objective.max_reward=5")))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008"]


def test_equal_rewards_are_no_signal(folder, tmp_path, caplog):
    train(compose("train", given(folder, tmp_path / "run", "max_steps=1", *SAME)))
    assert "all 8 answers have the same score, so there is no signal" in caplog.text


def test_held_out_prompts_are_answered_and_scored(folder, tmp_path):
    held = ("data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=5")
    result = train(compose("train", given(folder, tmp_path / "run", *held, "max_steps=4")))
    for report in (result.before, result.after):
        assert report.rows == 2
        assert report.loss == -report.metrics["reward"]
        assert report.metrics["reward"] == report.metrics["length"]
        assert len(report.samples) == 2
        assert report.accuracy is not None


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["reward_model=[]"],
            ConfigError,
            "objective=ppo needs something that scores answers: choose reward_model",
        ),
        (["reference.model=elsewhere"], ConfigError, "leave out reference.model"),
        (["auxiliary.sft=0.1"], ConfigError, "learns from its own answers"),
        (["reward_model=[outcome]"], ConfigError, "reward_models.outcome.model is missing"),
        (["data.columns={question: prompt}"], DataError, "an answer needs 'prompt'"),
    ],
)
def test_runs_that_cannot_be_are_refused(folder, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        train(compose("train", given(folder, tmp_path / "run", *overrides)))


def test_a_prompt_that_leaves_no_room_is_named(folder, tmp_path):
    long = tmp_path / "long.jsonl"
    write_rows(long, [{"prompt": "a then"}, {"prompt": "one two " * 200}])
    with pytest.raises(DataError, match=r"long.jsonl:2: .* tokens"):
        train(compose("train", given(folder, tmp_path / "run", "overflow=refuse", f"data.path={long}")))


def test_tokens_without_notes_are_no_rollout(folder):
    from luthier import Branch, Tree

    with pytest.raises(DataError, match="they are no rollout"):
        Pack.of([Tree((1,), (Branch((2, 3)),))]).notes("advantage")
    assert rollouts

"""Mergers against mergekit: the same checkpoints give the same weights, element by element."""

import functools
import warnings
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_llama, tiny_tokenizer
from luthier import compose
from luthier_plugins.commands.merge import merge
from luthier_plugins.mergers.dare.random_mask import kept_at_random

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports numpy.core
    mergekit = pytest.importorskip("mergekit.merge")
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_state_dicts

pytestmark = pytest.mark.slow
LABELS = ("one", "three", "two")  # in the order that Luthier gives them
WEIGHTS = {"one": 1.0, "three": 0.25, "two": 2.5}
EQUAL = dict.fromkeys(LABELS, 1.0)
GRID = 1 / 64
EMBEDDING = "model.embed_tokens.weight"


def make(root, levels=None, dtype=torch.float32, **options):
    """Save a base and three models tuned from it.

    With `levels` all values are multiples of `GRID`, and changes are by at most `levels` of it: sums are then
    exact, and most magnitudes are those of many other elements.
    """
    model = tiny_llama(**options)
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    for seed, label in enumerate(("base", *LABELS)):
        g = torch.Generator().manual_seed(seed)
        for name, one in model.named_parameters():
            if levels is None:
                values = base[name] + 0.1 * bool(seed) * torch.randn(one.shape, generator=g)
            else:
                moved = torch.randint(-levels, levels + 1, one.shape, generator=g) * bool(seed)
                values = ((base[name] / GRID).round() + moved) * GRID
            one.data = values.to(dtype)
        model.save_pretrained(root / label, max_shard_size="60KB")
        tiny_tokenizer().save_pretrained(root / label)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Models whose magnitudes are mostly equal; of the embedding more than are held at a time."""
    return make(tmp_path_factory.mktemp("tied"), levels=3, vocab_size=36_000, tie_word_embeddings=True)


def weights(folder):
    """Every tensor of a folder, its shards together."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def ours(root, run, *options, labels=LABELS, given=EQUAL):
    """What the whole command makes of the models."""
    words = [f"models={{{', '.join(f'{label}: {root / label}' for label in labels)}}}", f"run_dir={run}"]
    words += [f"+merger.weights.{label}={given[label]}" for label in labels if given[label] != 1]
    if options[0] != "merger=soup":
        words.append(f"base={root / 'base'}")
    return weights(merge(compose("merge", [*words, *options])).model_dir)


def theirs(root, method, labels=LABELS, given=EQUAL, dtypes=(torch.float32, None), **options):
    """What mergekit's functions make of the tensors; `scaling` is its lambda."""
    names = labels if method == "linear" else ("base", *labels)
    if "scaling" in options:
        options["lambda"] = options.pop("scaling")
    return merge_state_dicts(
        {name: weights(root / name) for name in names},
        method,
        parameters={"weight": {label: given[label] for label in labels}, **options},
        base=None if method == "linear" else "base",
        dtype=dtypes[0],
        out_dtype=dtypes[1],
    )


def assert_same(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("given", [EQUAL, WEIGHTS], ids=["plain", "weighted"])
def test_soup_is_linear(models, tmp_path, given):
    assert_same(ours(models, tmp_path, "merger=soup", given=given), theirs(models, "linear", given=given))


@pytest.mark.parametrize("given", [EQUAL, {**WEIGHTS, "two": -0.5}], ids=["plain", "forgetting"])
def test_task_arithmetic(models, tmp_path, given):
    found = ours(models, tmp_path, "merger=task_arithmetic", "merger.scaling=0.7", given=given)
    assert_same(found, theirs(models, "task_arithmetic", given=given, scaling=0.7))


@pytest.mark.parametrize("given", [EQUAL, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(("density", "scaling"), [(0.2, 1.0), (0.5, 0.7), (1.0, 1.5)])
def test_ties(models, tmp_path, density, scaling, given):
    found = ours(models, tmp_path, "merger=ties", f"merger.density={density}", f"merger.scaling={scaling}",
                 given=given)  # fmt: skip
    assert_same(found, theirs(models, "ties", given=given, density=density, scaling=scaling))


@pytest.fixture
def first_of_equals(monkeypatch):
    """Let mergekit keep the first of equal magnitudes; its own sort is not stable, and keeps any."""
    monkeypatch.setattr(torch, "argsort", functools.partial(torch.argsort, stable=True))


@pytest.mark.parametrize("density", [0.1, 0.37, 0.8])
@pytest.mark.usefixtures("first_of_equals")
def test_ties_keeps_the_same_of_equal_magnitudes(tied, tmp_path, density):
    options = ("merger=ties", f"merger.density={density}")
    base = weights(tied / "base")
    found = ours(tied, tmp_path / "one", *options, labels=("one",))
    expected = theirs(tied, "ties", labels=("one",), density=density)
    assert base[EMBEDDING].numel() > 2**20
    for name, one in base.items():
        delta = weights(tied / "one")[name] - one
        kept, cut = found[name] != one, (found[name] == one) & (delta != 0)
        assert torch.equal(kept, expected[name] != one), name
        if one.ndim > 1:  # the threshold goes through equals
            assert delta[kept].abs().min() == delta[cut].abs().max(), name
    # Sums of multiples are exact: nothing is rounded but the quotient, once.
    assert_same(ours(tied, tmp_path / "all", *options), theirs(tied, "ties", density=density), atol=0)


@pytest.mark.parametrize("density", [0.1, 0.37, 0.8])
def test_ties_keeps_as_many_whatever_their_sort(tied, tmp_path, density):
    found = ours(tied, tmp_path, "merger=ties", f"merger.density={density}", labels=("one",))
    expected = theirs(tied, "ties", labels=("one",), density=density)
    for name, one in weights(tied / "base").items():
        sizes = [(merged[name] - one).abs().flatten().sort().values for merged in (found, expected)]
        assert torch.equal(*sizes), name


def with_our_masks(monkeypatch, root, labels, drop, seed, call):
    """Call mergekit, which draws tensor after tensor and model after model, with what Luthier drops."""
    keys = ((seed, name, label) for name, label in product(weights(root / "base"), labels))
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "bernoulli", lambda chance: kept_at_random(chance.shape, 1 - drop, next(keys), 0)
        )
        found = call()
    assert next(keys, None) is None
    return found


@pytest.mark.parametrize("given", [EQUAL, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(("then", "method"), [("average", "dare_linear"), ("ties", "dare_ties")])
@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_dare_with_the_same_masks(models, tmp_path, monkeypatch, then, method, drop, given):
    # Their `rescale` keeps a tensor's sum of magnitudes; the paper divides by 1 − p, which lambda can do.
    options = {"density": 1 - drop, "rescale": False, "normalize": True, "scaling": 0.7 / (1 - drop)}
    expected = with_our_masks(
        monkeypatch, models, LABELS, drop, 5, lambda: theirs(models, method, given=given, **options)
    )
    found = ours(models, tmp_path, "merger=dare", f"merger.drop={drop}", f"merger.then={then}",
                 "merger.scaling=0.7", "merger.seed=5", given=given)  # fmt: skip
    assert_same(found, expected)


def test_their_dare_scales_by_magnitudes_and_adds_up(models, tmp_path, monkeypatch):
    # Where mergekit's own defaults lead, so that the difference is known, not only avoided.
    base, drop = weights(models / "base"), 0.7
    expected = with_our_masks(
        monkeypatch, models, ("one",), drop, 0,
        lambda: theirs(models, "dare_linear", labels=("one",), given={"one": 2.0}, density=1 - drop),
    )  # fmt: skip
    found = ours(models, tmp_path, "merger=dare", f"merger.drop={drop}", "merger.scaling=2", labels=("one",))
    factors = {}
    for name, one in base.items():
        delta = weights(models / "one")[name] - one
        kept = kept_at_random(one.shape, 1 - drop, (0, name, "one"), 0).bool()
        factors[name] = (1 - drop) * delta.abs().sum() / delta[kept].abs().sum()
        found[name] = one + (found[name] - one) * factors[name]
    assert_same(found, expected, atol=2e-6)
    assert max(abs(factor - 1) for factor in factors.values()) > 0.01


@pytest.mark.parametrize(("merger", "method"), [("soup", "linear"), ("ties", "ties")])
@pytest.mark.usefixtures("first_of_equals")
def test_bfloat16_is_rounded_once(tmp_path, merger, method):
    root = make(tmp_path, dtype=torch.bfloat16)
    more = {"density": 0.2} if method == "ties" else {}
    found = ours(root, tmp_path / "run", f"merger={merger}", given=WEIGHTS)
    expected = theirs(root, method, given=WEIGHTS, dtypes=(torch.float32, torch.bfloat16), **more)
    for name, one in expected.items():
        # fp32 results within 1e-6 may lie on two sides of a midpoint of bf16: seldom, and then a step apart.
        assert found[name].dtype == one.dtype == torch.bfloat16
        torch.testing.assert_close(found[name], one, rtol=2**-7, atol=1e-6)
        assert (found[name] != one).sum() <= 1 + one.numel() / 100, name


CASES = {"linear": ("merger=soup",), "ties": ("merger=ties", "merger.density=0.3")}


@pytest.mark.parametrize("method", CASES)
def test_their_whole_command_writes_the_same_model(models, tmp_path, method):
    about = {"linear": {}, "ties": {"base_model": str(models / "base"), "parameters": {"density": 0.3}}}
    own = [
        {"model": str(models / label), "parameters": {"weight": WEIGHTS[label]}} for label in reversed(LABELS)
    ]
    config = {"merge_method": method, "models": own, "dtype": "float32", **about[method]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mergekit.run_merge(
            MergeConfiguration.model_validate(config),
            str(tmp_path / "theirs"),
            mergekit.MergeOptions(quiet=True, write_model_card=False),
        )
    found = ours(models, tmp_path / "run", *CASES[method], given=WEIGHTS)
    assert_same(found, weights(tmp_path / "theirs"))

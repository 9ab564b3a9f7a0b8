"""The copy model, mixtures of it with others, and the calibration that finds their weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFORMANCE, CPU, tiny_config, tiny_documents, tiny_model, tiny_table

import train_gpt as tg

EXPERTS = {"stride+copy": 2, "mix": 3}


def uneven_weights(experts, seed=0):
    """Weights that differ by match and expert, and sum to 1."""
    rows = np.random.default_rng(seed).dirichlet(np.ones(experts), tg.ORDERS)
    return torch.from_numpy(rows)


def calibrated(rt, **settings):
    """A small model that brings a rate and weights."""
    model = tiny_model(tiny_config(**settings), rt)
    weights = {name: uneven_weights(experts) for name, experts in EXPERTS.items()}
    model.made_with = {"stream_lr": 0.004, "weights": weights}
    return model


def repetitive_documents(lengths):
    """Documents of few different tokens, which repeat themselves."""
    return tiny_documents(lengths, vocab_size=8)


# -- the copy model ----------------------------------------------------------------------------


def test_the_conformance_set_under_the_copy_model_alone(rt):
    """The sum and the matches that a prototype gave, which counted in another way."""
    stream = np.concatenate(tg.open_shards(str(CONFORMANCE), "val"))
    docs = tg.split_documents(stream, 1, 0, tiny_table(1024), CPU)
    losses, longest = tg.copy_losses(docs, 1024, rt).double()
    assert losses.sum().item() == pytest.approx(64_087.40, abs=0.05)
    assert longest.long().bincount().tolist() == [4134, 4223, 1484, 854, 580, 386, 2027]


def count_by_hand(text, vocab_size):
    """(p, longest match) of each target of a document, by looking back at every one before it."""
    for i in range(len(text) - 1):
        p = 1 / vocab_size
        longest = 0
        for order in range(tg.ORDERS):
            context = text[i + 1 - order : i + 1]
            if len(context) < order or i + 1 < order:
                break
            followers = []
            for j in range(max(order - 1, 0), i):
                if text[j + 1 - order : j + 1] == context:
                    followers.append(text[j + 1])
            escape = 0.6 * len(set(followers)) + 0.2 if order else 0.5 * vocab_size
            p = (followers.count(text[i + 1]) + escape * p) / (len(followers) + escape)
            if followers:
                longest = order
        yield p, longest


def test_copying_is_counting(rt):
    """Within a document only, whatever the number of ranks and groups of documents."""
    docs = repetitive_documents([40, 2, 70, 33])
    first = docs.tokens[: docs.predictions[0]]
    first[20:36] = first[2:18].clone()  # long matches
    expected = []
    for start, count in zip(docs.starts, docs.predictions, strict=True):
        text = docs.tokens[start : start + count + 1].tolist()
        expected += count_by_hand(text, 8)
    p, longest = np.array(expected).T
    losses, match = tg.copy_losses(docs, 8, rt).numpy()
    np.testing.assert_allclose(losses, -np.log(p), rtol=1e-5)
    assert match.tolist() == longest.tolist() and match.max() == 6


@pytest.mark.parametrize("length", [12, 60])
def test_probabilities_sum_to_one(rt, length):
    """Of the copy model and of both mixtures, for every possible last target of a document."""
    model = calibrated(rt, vocab_size=8)
    docs = repetitive_documents([length])
    sums = dict.fromkeys(("copy", *EXPERTS), 0.0)
    for target in range(8):
        tokens = docs.tokens.clone()
        tokens[docs.predictions[0]] = target
        changed = replace(docs, tokens=tokens)
        rungs = tg.ladder(changed, model, rt)
        for name in sums:
            if name == "copy":
                ledger = tg.copy_losses(changed, 8, rt)
            else:
                ledger = tg.score_tokens(model, changed, rungs[name], rt, {})
            sums[name] += ledger[0, docs.predictions[0] - 1].double().neg().exp().item()
    assert list(sums.values()) == pytest.approx([1.0] * 3, abs=1e-5)


# -- mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_is_its_experts_average(rt, name):
    """With the weights of each position's longest match; every expert is computed once."""
    model = calibrated(rt)
    docs = tiny_documents([30, 9, 50], vocab_size=8)
    rungs = tg.ladder(docs, model, rt)
    known = {}
    mixed, times = tg.score_tokens(model, docs, rungs[name], rt, known)
    names = tg.MIXTURES[name]
    copied, match = tg.copy_losses(docs, model.cfg.vocab_size, rt)
    losses = [known[rungs[expert]][0] for expert in names[:-1]]
    probabilities = torch.stack([*losses, copied], dim=1).neg().exp()
    weights = model.made_with["weights"][name][match.long()]
    expected = -(weights * probabilities).sum(1).log()
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-6)
    assert times.eq(1).all() and len(known) == len(names)


def test_a_leak_of_the_copy_model_is_found(rt, monkeypatch):
    model = calibrated(rt)
    docs = repetitive_documents([50, 9, 60, 33, 40])
    how = tg.ladder(docs, model, rt)["stride+copy"]
    assert tg.audit_causality(model, docs, how, rt).startswith("documents:3 compared:")
    monkeypatch.setattr(tg, "sum_earlier", lambda keys, values: keys.bincount()[keys] * values)
    with pytest.raises(tg.UserError, match=r"audit causality: .*leaks"):
        tg.audit_causality(model, docs, how, rt)


# -- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.0, 0.00011, 0.0007, 0.009])
def test_the_rate_of_least_loss_is_found(best):
    tried = {}

    def loss_at(rate):
        distance = np.log(max(rate, 1e-6) / best) if best else rate
        return tried.setdefault(rate, distance**2)

    assert tg.find_rate(loss_at) == pytest.approx(best, rel=0.5)
    assert len(tried) <= 8


def test_without_time_the_safe_rate_stays():
    assert tg.find_rate(lambda rate: np.inf) == tg.SAFE_RATE


def test_weights_follow_the_expert_that_predicts(rt):
    """Where matches are long the second expert is right; a length that never occurs stays equal."""
    losses = torch.tensor([[0.1, 3.0]] * 50 + [[3.0, 0.1]] * 50).double()
    match = torch.tensor([0] * 50 + [6] * 50)
    weights = tg.fit_weights(losses, match).numpy()
    assert weights[0, 0] > 0.9 and weights[6, 1] > 0.9
    assert weights[3].tolist() == [0.5, 0.5]
    assert weights.sum(1) == pytest.approx(1)


def test_the_better_of_two_that_nearly_agree_is_trusted():
    """Else a mixture loses where adapting does harm."""
    torch.manual_seed(0)
    better = torch.rand(2000).double()
    worse = better + 0.05 + 0.1 * torch.randn(2000)
    weights = tg.fit_weights(torch.stack((worse, better), 1), torch.zeros(2000, dtype=torch.int64))
    assert weights[0, 1] > 0.98


def test_the_last_documents_are_cut(rt):
    parts = [[1, *range(5, 5 + n)] for n in (9, 3, 6, 4)]
    stream = tg.TokenStream([np.concatenate(parts)], 96)
    docs = tg.last_documents(stream, 1, 5, 14, rt)
    # The last three; two are cut to five targets, the last one ends with the stream.
    assert docs.starts.tolist() == [10, 14, 21]
    assert docs.predictions.tolist() == [4, 5, 4]
    # Text without any document's beginning is one.
    stream = tg.TokenStream([np.arange(5, 45)], 96)
    docs = tg.last_documents(stream, 1, 10, 20, rt)
    assert (docs.starts.tolist(), docs.predictions.tolist()) == ([0], [10])


@pytest.mark.parametrize("has_time", [True, False])
def test_calibration_finds_rate_and_weights_in_its_time(rt, capsys, has_time):
    model = tiny_model(tiny_config(), rt)
    tokens = np.concatenate([repetitive_documents([60] * 9).tokens.numpy(), [1]])
    stream = tg.TokenStream([tokens], 96)
    if not has_time:
        stream.deadline = 0.0
    tg.calibrate(model, stream, 1, rt, tg.RunLog())
    found = model.made_with
    assert ("mix" in found["weights"]) == has_time
    assert (found["stream_lr"] == tg.SAFE_RATE) == (not has_time)
    assert f"calibration: rate:{found['stream_lr']:.6f} rates_tried:" in capsys.readouterr().out

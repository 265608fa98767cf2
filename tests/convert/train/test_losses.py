"""The losses: transformers' and torch's, whole or in pieces, of packed rows and of preferences."""

import math

import pytest
import torch

from convert.data import encode
from convert.data.encode import Pair
from convert.train.losses import LossHead, Preference, TokenLoss, head_is_more, loss_rows
from tests.support.runs import configure
from tests.support.training import adapted, gradients, plain, sample

# Seconds of training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture
def made(tmp_path, base):
    """Configurations over the toy."""
    return configure(tmp_path, base, quantization_bit=4, learning_rate=1e-2, max_steps=6, save_strategy="no")


@pytest.mark.parametrize("kind", ["in pieces", "trained head", "capped"])
def test_loss_head_equals_transformers_loss(base, made, kind, monkeypatch):
    """Losses and gradients; in pieces where, and only where, the head is no more than its weight."""
    one_model = adapted(base, made()).eval()
    head = one_model.get_output_embeddings()
    if kind == "trained head":
        head.weight.requires_grad_()
    if kind == "capped":
        plain = one_model.get_base_model().forward

        def capped(*args, **more):
            labels = more.pop("labels", None)
            made = plain(*args, **more)
            made.logits = 5 * torch.tanh(made.logits / 5)
            if labels is not None:
                made.loss = one_model.loss_function(made.logits, labels, made.logits.shape[-1])
            return made

        monkeypatch.setattr(one_model.get_base_model(), "forward", capped)
    reasons = {"in pieces": "", "trained head": "its output head is", "capped": "it changes its logits"}
    assert " ".join(head_is_more(one_model).split()[:4]) == reasons[kind]
    monkeypatch.setattr("convert.train.losses._LOGITS", 0)  # sixteen tokens at a time
    batch = [sample(9), sample(20, seed=1)]
    one_model.zero_grad()
    losses, rows = LossHead(one_model)(batch, "cpu")
    assert rows.tolist() == [0] * 7 + [1] * 18
    losses.sum().backward()
    mine = gradients(one_model)
    one_model.zero_grad()
    for at, one in enumerate(batch):
        labels = torch.tensor([one.labels])
        whole = one_model(input_ids=torch.tensor([one.ids]), labels=labels).loss
        assert losses[rows == at].mean().item() == pytest.approx(whole.item(), rel=1e-4)
        (whole * one.learnt).backward()
    torch.testing.assert_close(mine, gradients(one_model), atol=1e-5, rtol=1e-3)


def test_t10_packed_rows_do_not_see_each_other(base):
    rows = [sample(3, seed=1, prompt=1), sample(5, seed=2, prompt=1), sample(9, seed=3, prompt=1)]
    packs = encode.pack(rows, 9)
    assert sorted(one.starts for one in packs) == [(0,), (0, 5)]
    head = LossHead(plain(base))
    apart = sum(float(head([row], "cpu")[0].detach().sum()) for row in rows)
    together = float(head(packs, "cpu")[0].detach().sum())
    assert together == pytest.approx(apart, rel=1e-5)
    assert head(packs, "cpu")[1].tolist().count(1) == 6


# Of one pair with log probabilities -3 (2 tokens) and -4 (4 tokens), the reference -5 and -2: by hand.
@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"pref_loss": "sigmoid"}, -math.log(1 / (1 + math.exp(-0.4)))),
        ({"pref_loss": "hinge"}, 0.6),
        ({"pref_loss": "ipo"}, (1.0 + 0.5 - 5) ** 2),
        ({"pref_loss": "kto_pair"}, 1 - (1 / (1 + math.exp(-0.2)) + 1 / (1 + math.exp(-0.4))) / 2),
        ({"pref_loss": "simpo", "pref_beta": 2.0}, math.log(1 + math.exp(0.5 - 2 * (-1.5 + 1.0)))),
        ({"pref_loss": "sigmoid", "pref_ftx": 2.0}, math.log(1 + math.exp(-0.4)) + 2 * 1.5),
        (
            {"dpo_label_smoothing": 0.25},
            0.75 * math.log(1 + math.exp(-0.4)) + 0.25 * math.log(1 + math.exp(0.4)),
        ),
        (
            {"pref_loss": "orpo"},
            1.5 + 0.1 * math.log(1 + math.exp(math.log(math.exp(1.5) - 1) - math.log(math.exp(1.0) - 1))),
        ),
    ],
)
def test_preference_losses(made, changes, want):
    class Head:
        def sums(self, batch, device):
            return torch.tensor([-3.0, -4.0]), torch.tensor([2.0, 4.0])

    pair = Pair("p", sample(4, seed=1), sample(6, seed=2))
    config = made(stage="dpo", dataset="p", learning_rate=1e-6, **changes)
    losses, _ = Preference(Head(), config, {id(pair): (-5.0, -2.0)})([pair], "cpu")
    assert losses.item() == pytest.approx(want, rel=1e-5)


def test_the_loss_in_pieces_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 24, dtype=torch.float64).requires_grad_()
    weight, targets = torch.randn(90, 24, dtype=torch.float64), torch.randint(0, 90, (50,))
    by = torch.rand(50)
    monkeypatch.setattr("convert.train.losses._LOGITS", 90 * 16)
    assert loss_rows(50, 24, 90) == 16
    losses = TokenLoss.apply(hidden, weight, targets)
    (mine,) = torch.autograd.grad((losses * by).sum(), hidden)
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (theirs,) = torch.autograd.grad((want * by).sum(), hidden)
    torch.testing.assert_close(losses.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(TokenLoss.apply(hidden, weight, targets), losses)

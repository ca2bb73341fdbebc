"""A batch in parts is the whole batch, for any loss that is a weighted mean or a sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.data.fields import as_inputs
from gm_probe.errors import UsageError
from gm_probe.models.door import Outputs
from gm_probe.training.methods import METHODS
from gm_probe.training.methods.iam import IAMD, IAMS
from gm_probe.training.methods.sam import ASAM, SAM
from gm_probe.training.rule import Rule
from gm_probe.training.sub_batches import SubBatches, loss_shares

WEIGHTS = torch.tensor([0.2, 3.0, 5.0])


class Mixup:
    def __call__(self, logits: Tensor, y: tuple[Tensor, Tensor, float]) -> Tensor:
        first, second, share = y
        return share * functional.cross_entropy(logits, first) + (1 - share) * functional.cross_entropy(
            logits, second
        )


class FocalSum:
    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        log_p = functional.cross_entropy(logits, y, reduction="none")
        return ((1 - (-log_p).exp()) ** 2 * log_p).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=0),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights and smoothing": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "focal sum": FocalSum(),
    "margin": nn.MultiMarginLoss(weight=WEIGHTS),
    "of its own": lambda z, y: (
        (WEIGHTS[y] * functional.cross_entropy(z, y, reduction="none")).sum() / WEIGHTS[y].sum()
    ),
}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def examples(count: int = 26) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    rare = torch.rand(count, generator=generator) > 0.8
    return x, torch.where(rare, torch.randint(1, 3, (count,), generator=generator), 0)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("m", [None, 13, 8, 5, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_to_the_whole_batch(loss: str, m: int | None) -> None:
    model, (x, y) = network(), examples()
    expected = LOSSES[loss](model(x), y)
    expected.backward()
    whole = gradient(model)
    model.zero_grad()
    step = Rule(model, LOSSES[loss], m=m).backward(x, y)
    torch.testing.assert_close(gradient(model), whole, rtol=1e-4, atol=1e-6)
    assert float(step.loss) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("rule", [SAM, ASAM, IAMD, IAMS])
@pytest.mark.parametrize("loss", ["class weights", "ignored labels", "sum"])
def test_at_radius_zero_every_rule_gives_the_gradient_of_the_whole(rule: type[Rule], loss: str) -> None:
    model, (x, y) = network(), examples()
    LOSSES[loss](model(x), y).backward()
    whole = gradient(model)
    model.zero_grad()
    rule(model, LOSSES[loss], rho=0.0, m=7).backward(x, y)  # type: ignore[call-arg]
    torch.testing.assert_close(gradient(model), whole, rtol=1e-4, atol=1e-6)


def test_a_part_whose_labels_are_all_ignored_counts_nothing() -> None:
    model, (x, _) = network(), examples(8)
    y = torch.tensor([0, 0, 0, 0, 1, 2, 1, 0])
    loss = nn.CrossEntropyLoss(ignore_index=0)
    loss(model(x), y).backward()
    whole = gradient(model)
    for method in ("sgd", "sam"):
        model.zero_grad()
        rule = METHODS[method](model, loss, m=4)
        step = rule.backward(x, y)
        assert bool(torch.isfinite(step.loss))
        if method == "sgd":
            torch.testing.assert_close(gradient(model), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: functional.cross_entropy(z, y) ** 2,
        lambda z, y: functional.cross_entropy(z / z.norm(), y),
        lambda z, y: functional.cross_entropy(z, y) + z.mean(0).norm(),
        lambda z, y: functional.cross_entropy(z, y, reduction="sum") + 3.0,
        lambda z, y: functional.cross_entropy(z, y) + z.var(0, unbiased=False).sum(),
        lambda z, y: functional.cross_entropy(z, y, reduction="none").max(),
    ],
)
@pytest.mark.parametrize("m", [8, 6, 1])
def test_a_loss_that_parts_do_not_make_up_is_refused(loss: Callable[..., Tensor], m: int) -> None:
    """Also where all parts are equal in size."""
    model, (x, y) = network(), examples(12)
    Rule(model, loss).backward(x, y)
    with pytest.raises(UsageError, match="neither a weighted mean nor a sum"):
        Rule(model, loss, m=m).backward(x, y)


def test_an_empty_batch_is_refused() -> None:
    x, y = examples()
    with pytest.raises(UsageError, match="holds no example"):
        Rule(network()).backward(x[:0], y[:0])


def test_a_loss_of_several_numbers_is_refused() -> None:
    x, y = examples()
    with pytest.raises(UsageError, match="not one number"):
        Rule(network(), nn.CrossEntropyLoss(reduction="none")).backward(x, y)


@pytest.mark.parametrize(
    ("count", "m", "sizes"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (3, 2, [3]), (3, 1, [1, 1, 1]), (1, 4, [1])]
)
def test_a_last_part_of_one_example_joins_the_one_before(count: int, m: int, sizes: list[int]) -> None:
    x, y = examples(count)
    parts = SubBatches(x, y, m).parts
    assert [len(part.y) for part in parts] == sizes
    assert torch.equal(torch.cat([part.x for part in parts]), x)  # type: ignore[arg-type]


def test_shares_of_a_mean_are_those_of_the_examples() -> None:
    _, y = examples(10)
    made_up = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).split([4, 4, 2])
    shares = loss_shares(functional.cross_entropy, made_up, y.split([4, 4, 2]))
    assert shares == pytest.approx([0.4, 0.4, 0.2])


# what loss.backward() would do


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.centres = nn.Parameter(torch.randn(3, 3, generator=generator))
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        cosines = functional.normalize(z) @ functional.normalize(self.centres).T
        return functional.cross_entropy(self.scale * cosines, y)


@pytest.mark.parametrize("m", [None, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("closure", [False, True])
def test_a_loss_with_parameters_of_its_own(method: str, m: int | None, closure: bool) -> None:
    """At radius 0 they get what loss.backward() gives them, be the loss a module or a function that holds one."""
    model, loss, (x, y) = network(), Prototypes(), examples()
    loss(model(x), y).backward()
    expected = [loss.centres.grad, loss.scale.grad]
    loss.zero_grad()
    options: dict[str, Any] = {} if method == "sgd" else {"rho": 0.0 if "onepass" not in method else 1e-6}
    criterion = (lambda z, y: loss(z, y)) if closure else loss
    METHODS[method](model, criterion, m=m, **options).backward(x, y)
    for found, right in zip([loss.centres.grad, loss.scale.grad], expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


def test_inputs_that_want_a_gradient_get_it() -> None:
    model, (x, y) = network(), examples()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    Rule(model).backward(ours, y)
    functional.cross_entropy(model(theirs), y).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_hooks_on_parameters_run() -> None:
    model, (x, y) = network(), examples()
    mask = torch.zeros(10, 6)
    mask[:3] = 1
    weight: nn.Parameter = model[0].weight  # type: ignore[index, assignment]
    weight.register_hook(lambda g: g * mask)
    seen: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(seen.append)
    for method in METHODS:
        weight.grad = None
        METHODS[method](model).backward(x, y)
        assert weight.grad is not None
        assert float((weight.grad * (1 - mask)).abs().max()) == 0, method
    assert len(seen) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_labels(method: str) -> None:
    model, (x, y) = network(), examples()
    target = (y, y.flip(0), 0.3)
    whole = METHODS[method](model, Mixup()).backward(x, target)
    assert float(whole.loss) == pytest.approx(float(Mixup()(model(x), target).detach()), rel=1e-5)
    assert float(METHODS[method](model, Mixup(), m=8).backward(x, target).loss) == pytest.approx(
        float(whole.loss), rel=1e-4
    )


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.net(tokens * mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [None, 8])
def test_named_inputs_and_inputs_in_order(method: str, m: int | None) -> None:
    model, (x, y) = network(), examples()
    METHODS[method](model, m=m, generator=torch.Generator().manual_seed(5)).backward(x, y)
    for inputs in ({"tokens": x, "mask": torch.ones_like(x)}, (x, torch.ones_like(x))):
        two = TwoInputs()
        two.net.load_state_dict(model.state_dict())
        METHODS[method](two, m=m, generator=torch.Generator().manual_seed(5)).backward(inputs, y)
        torch.testing.assert_close(gradient(two), gradient(model))


@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_are_the_dense_ones(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, y = (
        torch.randint(0, 20, (24, 5), generator=generator),
        torch.randint(0, 3, (24,), generator=generator),
    )
    found = []
    for sparse in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=sparse), nn.Tanh(), nn.Linear(6, 3))
        rule = METHODS[method](model, m=10, generator=torch.Generator().manual_seed(5))
        rule.backward(ids, y)
        rule.backward(ids, y)
        found.append(gradient(model))
    torch.testing.assert_close(found[1], found[0])


# yes-or-no labels


@pytest.mark.parametrize("method", ["iam-d", "iam-d-onepass", "iam-s", "sam"])
def test_one_logit_is_the_form_with_two(method: str) -> None:
    """A network of one logit under BCE, against the same with a second one that is 0 under cross-entropy."""

    class Two(nn.Module):
        def __init__(self, one: nn.Module) -> None:
            super().__init__()
            self.one = one

        def forward(self, x: Tensor) -> Tensor:
            z = self.one(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    two = Two(copy.deepcopy(one))
    METHODS[method](two, generator=torch.Generator().manual_seed(2)).backward(x, y)
    rule = METHODS[method](
        one,
        nn.BCEWithLogitsLoss(),
        generator=torch.Generator().manual_seed(2),
        outputs=Outputs(head="binary"),
    )
    rule.backward(x, y[:, None].double())
    torch.testing.assert_close(gradient(one), gradient(two))


@pytest.mark.parametrize("method", ["iam-d", "iam-d-onepass", "iam-s"])
@pytest.mark.parametrize("labels", [1, 4])
def test_independent_labels_are_never_taken_for_classes(method: str, labels: int) -> None:
    x, _ = examples()
    y = torch.randint(0, 2, (len(x), labels), generator=torch.Generator().manual_seed(0)).float()
    y[0] = 0
    for loss in (nn.BCEWithLogitsLoss(), lambda z, y: functional.binary_cross_entropy_with_logits(z, y)):
        with pytest.raises(UsageError, match="head"):
            METHODS[method](nn.Linear(6, labels), loss).backward(x, y)


def test_the_divergence_of_several_labels_is_the_sum_of_theirs() -> None:
    x, _ = examples()
    y = torch.randint(0, 2, (len(x), 4), generator=torch.Generator().manual_seed(0)).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
    rule = IAMD(model, nn.BCEWithLogitsLoss(), rho=0.4, outputs=Outputs(head="multilabel"))
    before = copy.deepcopy(model)
    step = rule.backward(x, y)
    assert step.inconsistency is not None
    # along the line to the found δ no direction may beat it by much, and by hand it is a sum of Bernoulli KLs
    start = rule.parameters.random(0.1, torch.Generator().manual_seed(0))

    def divergence(offset: Tensor) -> Tensor:
        values = rule.parameters.moved(offset)
        p, q = before(x).sigmoid().detach(), torch.func.functional_call(before, values, (x,)).sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()

    offset = start.requires_grad_()
    [slope] = torch.autograd.grad(divergence(offset), offset)
    expected = divergence(0.4 * slope / slope.norm())
    torch.testing.assert_close(step.inconsistency, expected.detach(), rtol=1e-4, atol=1e-7)


def test_outputs_are_looked_at_before_the_first_step() -> None:
    x, y = examples()
    cases = [
        (nn.Sequential(network(), nn.Softmax(1)), "probabilities"),
        (nn.Linear(6, 1), "--head binary"),
    ]
    for model, words in cases:
        for rule in (Rule(model), IAMD(model)):
            with pytest.raises(UsageError, match=words):
                rule.backward(x, torch.zeros_like(y))


def test_gradients_that_are_off_are_named() -> None:
    x, y = examples()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(UsageError, match=r"outside torch\.no_grad"):
            SAM(network()).backward(x, y)


def test_targets_may_be_an_array() -> None:
    model, (x, y) = network(), examples()
    assert float(Rule(model).backward(x, y.numpy()).loss) == pytest.approx(
        float(functional.cross_entropy(model(x).detach(), y))
    )
    with pytest.raises(UsageError):
        Rule(model).backward("x", y)
    assert len(as_inputs((x, y))) == len(x)

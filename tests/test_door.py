"""What is taken at the door, what is refused, and by which words; a network's own values are the oracle."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gm_probe.data.fields import Fields, arguments, as_inputs
from gm_probe.errors import UsageError
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.zoo import logits_at

Z = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -3.0]])
MANY = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
FEATURES = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
Named = namedtuple("Named", "features scores")


@dataclass
class Record:
    scores: Tensor
    logits: Tensor | None = None


@pytest.mark.parametrize(
    ("returned", "output"),
    [
        (Z, None),
        (Record(FEATURES, Z), None),
        ({"logits": Z, "features": FEATURES}, None),
        ((FEATURES, Z), 1),
        ((FEATURES, Z), "1"),
        ([Z, FEATURES], 0),
        ((FEATURES, Z), -1),
        (Named(FEATURES, Z), "scores"),
        ({"features": FEATURES, "out": Z}, "out"),
        ({"features": FEATURES, "out": Z}, 1),
        (Record(Z), "scores"),
    ],
)
def test_the_output_that_is_meant(returned: Any, output: int | str | None) -> None:
    assert Outputs(output).taken(returned, 2) is Z


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((FEATURES, Z), r"a tuple of 0: \(2, 3\), 1: \(2, 3\); choose the logits by --output"),
        ((Z,), "a tuple of 0:"),
        ([Z, None], r"a list of 0: \(2, 3\), 1: NoneType"),
        (Named(FEATURES, Z), "a Named of features: .*, scores:"),
        ({"features": FEATURES, "out": Z}, "a dict of 'features': .*, 'out':"),
        (Record(Z), "a Record of scores: .*, logits: NoneType"),
        (None, "a NoneType"),
        (Z.sum(), "a single number, like a loss"),
        (Z[:, 0], "--head binary"),
        (Z[:, None], r"\(2, 1, 3\) for 2 example\(s\), not one row"),
        (Z[:, :, None, None], r"\(2, 3, 1, 1\)"),
        (Z.repeat(3, 1), r"6 rows of logits for 2 example"),
        (torch.ones(2, 3, dtype=torch.int64), "torch.int64"),
    ],
)
def test_outputs_that_are_no_clear_logits_are_described(returned: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Outputs().taken(returned, 2)


@pytest.mark.parametrize("output", [5, "scores", "9"])
def test_an_output_that_is_not_there(output: int | str) -> None:
    with pytest.raises(UsageError, match="which has no output"):
        Outputs(output).taken((FEATURES, Z), 2)


@pytest.mark.parametrize(
    ("outputs", "values", "words"),
    [
        (Outputs(), Z.softmax(1), "returned probabilities"),
        (Outputs(), Z.softmax(1).half(), "returned probabilities"),
        (Outputs(), torch.eye(3), "returned probabilities"),
        (Outputs(), (100 * MANY).softmax(1).bfloat16(), "returned probabilities"),
        (Outputs(), MANY.softmax(1).bfloat16(), "sums to 1"),
        (Outputs(), (6 * MANY).sigmoid(), "as a sigmoid's do"),
        (Outputs(head="binary"), torch.tensor([[0.2], [0.9]]), "every number lies in"),
        (Outputs(head="multilabel"), Z.sigmoid(), "every number lies in"),
        (Outputs(), Z[:, :1], "--head binary"),
        (Outputs(head="binary"), Z, "reads one logit per example"),
        (Outputs(kind="probabilities"), Z, "declared as probabilities"),
        (Outputs(kind="log-probabilities"), Z, "declared as log-probabilities"),
    ],
)
def test_outputs_of_another_kind_are_refused(outputs: Outputs, values: Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        outputs.checked(values)


@pytest.mark.parametrize(
    ("outputs", "values"),
    [
        (Outputs(), Z),
        (Outputs(), Z.log_softmax(1)),
        (Outputs(), Z.abs()),
        (Outputs(), torch.zeros(4, 3)),
        (Outputs(), (MANY / 10).relu()),
        (Outputs(), MANY / 100),
        (Outputs(kind="logits"), Z.softmax(1)),
        (Outputs(head="multilabel"), Z),
    ],
)
def test_logits_and_what_is_called_so_pass(outputs: Outputs, values: Tensor) -> None:
    assert outputs.checked(values).kind == "logits"


def test_probabilities_are_logits_by_their_logarithm() -> None:
    z = Z.double()
    for kind, values in (("probabilities", z.softmax(1)), ("log-probabilities", z.log_softmax(1))):
        found = Outputs(kind=kind).logits(values)  # type: ignore[arg-type]
        torch.testing.assert_close(found.softmax(1), z.softmax(1))
    pairs = {"logits": z, "probabilities": z.sigmoid(), "log-probabilities": nn.functional.logsigmoid(z)}
    for kind, values in pairs.items():
        found = Outputs(kind=kind, head="multilabel").logits(values)  # type: ignore[arg-type]
        torch.testing.assert_close(found.softmax(-1)[..., 1], z.sigmoid())
        torch.testing.assert_close(found[..., 1] - found[..., 0], z)


def test_probabilities_that_were_rounded_to_an_end_are_finite() -> None:
    for head, p in (("classifier", [[1.0, 0.0]]), ("binary", [[0.0], [1.0]])):
        values = torch.tensor(p, requires_grad=True)
        logits = Outputs(kind="probabilities", head=head).logits(values)  # type: ignore[arg-type]
        assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("wrong", [{"kind": "odds"}, {"head": "softmax"}], ids=["kind", "head"])
def test_settings_that_do_not_exist(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Outputs(**wrong)


# wrappers


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_wrappers_are_looked_through_one_within_the_other() -> None:
    """What is measured of wrapped networks is in test_any_model.py."""
    model = network()
    average = AveragedModel(model)
    assert unwrapped(nn.DataParallel(average)) is average.module
    assert unwrapped(nn.DataParallel(torch.compile(model, backend="eager"))) is model  # type: ignore[arg-type]


def test_a_module_that_looks_like_a_wrapper_is_not_looked_through() -> None:
    class Cooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) / 10

    model = Cooled()
    assert unwrapped(model) is model


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_modules_that_take_no_moved_weights_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module): ...

    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    cases = [(scripted, "TorchScript"), (FullyShardedDataParallel(), "sharded"), (nn.LazyLinear(2), "lazy")]
    for model, words in cases:
        with pytest.raises(UsageError, match=words):
            unwrapped(model)
    with pytest.raises(UsageError, match=r"a str, not an nn\.Module"):
        unwrapped("resnet18")  # type: ignore[arg-type]


# inputs


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return (a if b is None else a + 2 * b) * scale


class OneDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] + 2 * batch["b"]


@pytest.mark.parametrize("model", [Pair(), OneDict()], ids=["by name", "one dict"])
def test_several_tensors_make_one_input(model: nn.Module) -> None:
    x = as_inputs({"a": Z, "b": FEATURES})
    torch.testing.assert_close(logits_at(model, x), Z + 2 * FEATURES)
    torch.testing.assert_close(logits_at(model, x[1:]), (Z + 2 * FEATURES)[1:])


def test_tensors_in_order_and_what_has_no_rows() -> None:
    torch.testing.assert_close(logits_at(Pair(), as_inputs((Z, FEATURES))), Z + 2 * FEATURES)
    x = as_inputs({"a": Z, "scale": 3.0})
    assert arguments(Pair(), x[:1])[1]["scale"] == 3.0
    torch.testing.assert_close(logits_at(Pair(), x), 3 * Z)


def test_fields_are_cut_moved_and_joined_together() -> None:
    whole = Fields({"ids": torch.arange(5), "x": torch.rand(5, 2), "flag": True})
    parts = whole.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    joined = Fields.joined(parts).value
    assert torch.equal(joined["ids"], whole.value["ids"])
    assert joined["flag"] is True
    double = whole.double().value
    assert (double["ids"].dtype, double["x"].dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("content", [{}, {"n": 3}, (torch.rand(2), torch.rand(3))])
def test_inputs_without_rows_or_of_different_numbers_are_refused(content: Any) -> None:
    with pytest.raises(UsageError):
        as_inputs(content)


def test_the_input_is_left_as_it_is() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    x = Z.clone()
    logits_at(InPlace(), x)
    assert torch.equal(x, Z)

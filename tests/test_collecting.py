"""What people hand over to be measured: every form of the same examples gives the same figures, or is refused."""

import re
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gm_probe import (
    Batches,
    DataError,
    Examples,
    Normalization,
    Parameters,
    ProbeError,
    Settings,
    UsageError,
    fisher,
    hessian,
    measure,
)
from gm_probe.data.collecting import as_batches

NAMES = ["local_inconsistency", "fisher_lambda_max", "fisher_trace", "hessian_lambda_max"]
NAMES += ["error", "mean_entropy", "input_jacobian_norm"]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


X = torch.randn(20, 6, generator=generator())
Y = torch.randint(0, 3, (20,), generator=generator())


def values(data: Any, model: nn.Module | None = None) -> dict[str, float | None]:
    rows = measure(model or network(), data, NAMES if as_batches(data).labeled else NAMES[:3]).rows
    return {name: row.value for name, row in rows.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, float | None]:
    return values(Batches.from_tensors(X, Y))


class Pairs(Dataset[Any]):
    """A data set of Python's and NumPy's own values."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return X[index].numpy(), int(Y[index])


FORMS: dict[str, Any] = {
    "a pair": (X, Y),
    "a pair of arrays": (X.numpy(), Y.numpy()),
    "a read-only array backwards": (np.broadcast_to(X.numpy(), X.shape), Y.tolist()),
    "examples": Examples(X, Y, (), "mine"),
    "a data set": TensorDataset(X, Y),
    "a data set of arrays": Pairs(),
    "a loader": DataLoader(TensorDataset(X, Y), batch_size=8),
    "a list of pairs": [(X[:7], Y[:7]), (X[7:], Y[7:])],
    "a list of lists": [[X[:7], Y[:7]], [X[7:], Y[7:]]],
    "float64": (X.double(), Y),
    "labels of floats": (X, Y.float()),
    "labels of few bits": (X, Y.to(torch.uint8)),
    "x with a gradient": (X.clone().requires_grad_(), Y),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_examples_give_the_same_figures(
    form: str, expected: dict[str, float | None]
) -> None:
    found = values(FORMS[form])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("data", [X, [X[:3], X[3:]], TensorDataset(X), {"input": X}], ids=type)
def test_unlabeled_forms(data: Any, expected: dict[str, float | None]) -> None:
    found = values(data)
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)


def test_inputs_are_taken_in_the_dtype_of_the_weights() -> None:
    assert values((X.half(), Y)) == values((X.half().float(), Y))
    assert values((X, Y), network().double()) == values((X.double(), Y), network().double())


def test_weights_of_several_dtypes_leave_inputs_as_they_are() -> None:
    class Mixed(nn.Module):
        """A frozen first layer in float64, and a last one in float32."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 4).double().requires_grad_(False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).float())

    model = Mixed()
    found = measure(model, X.double(), ["mean_entropy"]).rows["mean_entropy"].value
    p = model(X.double()).detach().double().softmax(1)
    assert found == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-6)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield X[0]


class Broken(Pairs):
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        raise OSError("disk gone")


PAIRED = TensorDataset(X, Y)
REFUSED: dict[str, Any] = {
    "the DataLoader shuffles": DataLoader(PAIRED, batch_size=8, shuffle=True),
    "leaves out 4 example(s). Create it with drop_last=False": DataLoader(
        PAIRED, batch_size=8, drop_last=True
    ),
    "a Endless may be infinite": Endless(),
    "a Endless may be infinite. Give a list": DataLoader(Endless(), batch_size=2),
    "disk gone": Broken(),
    "there is none": [],
    "some have labels, and others have none": [(X[:3], Y[:3]), X[3:]],
    "cannot be joined into one set of examples": [X[:3], torch.zeros(3, 5)],
    "a tuple of 3 is not a batch": (X, Y, Y),
    "a generator is not a batch": (x for x in X),
    "a str is not a batch": "data/",
    "holds pixels, and their normalisation is unknown": Examples(X.to(torch.uint8), Y, (), "mine"),
    "x is uint8. Give what the model takes": X.to(torch.uint8),
    "y is torch.int64 of shape (5,) for 20": (X, Y[:5]),
    "y is a list that holds no numbers": (X, ["cat"] * 20),
    "the input is an array of <U1, which torch does not support": np.array(["a"] * 20),
    "x is a single number": torch.tensor(1.0),
    "holds no tensor with one row per example": {"input_ids": [[1, 2], [3, 4]]},
    "different numbers of rows ('a': 20, 'b': 5)": {"a": X, "b": X[:5]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(reason: str) -> None:
    with pytest.raises(ProbeError, match=re.escape(reason)) as caught:
        measure(network(), REFUSED[reason], ["mean_entropy"])
    assert isinstance(caught.value, UsageError | DataError)


def test_the_caller_may_be_in_inference_mode(expected: dict[str, float | None]) -> None:
    with torch.no_grad():
        assert values((X, Y)) == expected
    with torch.inference_mode():
        assert values((X, Y)) == expected
        assert values(Batches.from_tensors(X * 1, Y + 0)) == expected
        model, x, y = network(), X * 1, Y + 0
        assert values((X, Y), model) == expected
    assert x.is_inference()
    assert next(model.parameters()).is_inference()
    assert values(Batches.from_tensors(x, y)) == expected
    assert values((x, y), model) == expected
    assert values({"input": x, "labels": y}, model) == expected


def test_operators_do_not_vanish_in_inference_mode() -> None:
    model, batches = network().eval(), Batches.from_tensors(X, Y)
    parameters = Parameters(model)
    logits = parameters.logits(X).detach()
    operators = fisher(parameters, batches, logits), hessian(parameters, batches, Y)
    v = torch.randn(parameters.size, generator=generator())
    expected = [found for operator in operators for found in (operator.matvec(v), operator.terms(v))]
    with torch.inference_mode():
        inside = fisher(parameters, batches, logits), hessian(parameters, batches, Y)
        for many in (operators, inside):
            found = [one for operator in many for one in (operator.matvec(v * 1), operator.terms(v * 1))]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Packed(nn.Module):
    """Hands the rows of one tensor (B, 2, T) to a network as its two inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, packed: Tensor) -> Tensor:
        return self.net(*packed.unbind(1))


class Weighed(nn.Module):
    """Words and the share of each, by tensors of integers and of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, words: Tensor, shares: Tensor) -> Tensor:
        return self.last(torch.tanh((self.embedding(words.long()) * shares[..., None]).sum(1)))


def test_several_input_tensors_against_one_that_packs_them() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Weighed()
    words, shares = (
        torch.randint(0, 9, (20, 4), generator=generator()),
        torch.rand(20, 4, generator=generator()),
    )
    packed = torch.stack([words.float(), shares], 1)
    settings = Settings(trace_tolerance=0, max_probes=4)
    names = [*NAMES, "hessian_trace"]
    expected = measure(Packed(model), (packed, Y), names, settings).rows
    loader = DataLoader(
        [{"words": w, "shares": s, "labels": y} for w, s, y in zip(words, shares, Y, strict=True)]
    )
    forms: list[Any] = [
        ((words, shares), Y),
        ({"shares": shares.double(), "words": words}, Y),
        {"words": words, "shares": shares, "labels": Y},
        UserDict({"words": words, "shares": shares, "labels": Y, "labels_of": None}),
        loader,
    ]
    del forms[3]["labels_of"]
    for form in forms:
        rows = measure(model, form, names, settings).rows
        for name in names:
            assert rows[name].value == pytest.approx(expected[name].value, rel=1e-5), name
    assert expected["input_jacobian_norm"].value


def test_several_input_tensors_are_a_data_set_as_one_is() -> None:
    words, shares = torch.arange(12).view(4, 3), torch.rand(4, 3)
    batches = Batches.from_tensors({"words": words, "shares": shares}, torch.arange(4), batch_size=2)
    examples = batches.examples
    some = examples.subset(2, seed=0)
    assert some.x.content["words"].shape == (2, 3)
    part = batches.shard(1, 2)
    assert part.num_examples == 2
    (batch,) = part
    assert torch.equal(batch.x.content["shares"], shares[2:])
    other = Batches.from_tensors({"words": shares, "shares": words}, torch.arange(4)).examples
    same = Batches.from_tensors({"words": words.clone(), "shares": shares.clone()}, torch.arange(4)).examples
    assert examples.digest == same.digest != other.digest
    with pytest.raises(DataError, match="no channels to normalise"):
        next(iter(Batches(examples, Normalization((0.5,), (0.5,)))))


def test_images_of_several_tensors_have_no_mirror_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    row = measure(model, {"input": torch.randn(4, 1, 2, 2)}, ["flip_rate"]).rows["flip_rate"]
    assert row.value is None
    assert row.details["reason"] == "the inputs are not images"


def test_text_models_take_what_a_tokenizer_returns() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
        model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 20, (6, 7), generator=generator())
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [7], [2], [6]])).long()
    encoded = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": Y[:6]})

    class Masked(nn.Module):
        """The ids of masked words stand as 0 in one tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.net(input_ids=ids, attention_mask=(ids > 0).long()).logits
            return logits

    names = [
        "local_inconsistency",
        "fisher_lambda_max",
        "fisher_trace",
        "hessian_lambda_max",
        "cross_entropy",
    ]
    settings = Settings(num_starts=2)
    found = measure(model, encoded, names, settings).rows
    expected = measure(Masked(), (ids * mask, Y[:6]), names, settings).rows
    for name in names:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-4), name


class Bag(nn.Module):
    """A classifier of words whose embedding may have sparse gradients."""

    def __init__(self, kind: str, *, sparse: bool) -> None:
        super().__init__()
        self.kind, self.sparse = kind, sparse
        layers: dict[str, type[nn.Module]] = {"embedding": nn.Embedding, "bag": nn.EmbeddingBag}
        self.embedding = layers.get(kind, nn.Embedding)(
            9, 5, **({} if kind == "function" else {"sparse": sparse})
        )
        self.last = nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        if self.kind == "function":
            found = functional.embedding(words, self.embedding.weight, sparse=self.sparse)
        else:
            found = self.embedding(words)
        return self.last(torch.tanh(found if self.kind == "bag" else found.mean(1)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["embedding", "bag", "function"])
def test_sparse_gradients_give_the_dense_ones_figures(kind: str) -> None:
    dense, sparse = Bag(kind, sparse=False), Bag(kind, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    words = torch.randint(0, 9, (20, 4), generator=generator())
    names = ["local_inconsistency", "fisher_trace"]
    names += [] if kind == "bag" else ["fisher_lambda_max", "hessian_lambda_max", "hessian_lambda_min"]
    settings = Settings(trace_tolerance=0.01, max_probes=1000)
    expected = measure(dense, (words, Y), names, settings).rows
    found = measure(sparse, (words, Y), names, settings).rows
    for name in names:
        tolerance = 0.05 if name == "fisher_trace" and kind == "function" else 1e-5
        assert found[name].value == pytest.approx(expected[name].value, rel=tolerance), name
    assert sparse.sparse
    assert kind == "function" or sparse.embedding.sparse

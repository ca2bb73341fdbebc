"""Which cells there are. No torch here: the parent process must stay small (see ``meter``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MODELS = ("6cnn", "resnet20", "resnet56", "wrn-28-2")
TASKS = ("lambda_H", "lambda_F", "trace_H_5", "trace_H_1", "trace_F_5", "trace_F_1", "joint", "defaults", "S")
TOLERANCE = {"lambda_H": 0.01, "lambda_F": 0.01} | {
    f"trace_{matrix}_{percent}": percent / 100 for matrix in "HF" for percent in (5, 1)
}
RADII = (0.1, 1.0)

_EIGENTHINGS_TRACE = ("hutchinson", "hutch++")
_CURVLINOPS_TRACE = ("hutchinson", "hutchpp_trace", "xtrace")
_EIGSH = ("eigsh, ncv=20", "eigsh, ncv=8")
_S = tuple(f"rho={radius}" for radius in RADII)
_PYHESSIAN = {
    "lambda_H": ("power iteration",),
    "trace_H_5": ("hutchinson",),
    "trace_H_1": ("hutchinson",),
    "defaults": ("eigenvalues()", "trace()"),
}

METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "ours": {
        **dict.fromkeys(TASKS[:6], ("measure",)),
        "joint": ("H_5", "H_1", "all_5", "all_1"),
        "S": _S,
    },
    "pyhessian": _PYHESSIAN,
    "pyhessian-graph": _PYHESSIAN,
    "eigenthings": {
        "lambda_H": ("lanczos",),
        "lambda_F": ("lanczos",),
        **dict.fromkeys(TASKS[2:6], _EIGENTHINGS_TRACE),
        "defaults": ("lanczos(k=1)", "lanczos()", "trace()"),
    },
    "curvlinops": {
        "lambda_H": _EIGSH,
        "lambda_F": _EIGSH,
        "trace_H_5": _CURVLINOPS_TRACE,
        "trace_H_1": _CURVLINOPS_TRACE,
        # exact, of networks with nothing but linear and convolution layers
        "trace_F_5": (*_CURVLINOPS_TRACE, "EKFAC type-2"),
        "trace_F_1": (*_CURVLINOPS_TRACE, "EKFAC type-2"),
        "defaults": ("eigsh(k=1)",),
    },
    "paper": {"S": _S},
}
"""tool → task → methods; pyhessian-graph is PyHessian with all images as one ``data`` batch, whose graph it keeps."""

METHOD_NAMES = sorted({name for tasks in METHODS.values() for names in tasks.values() for name in names})
TOOLS = tuple(METHODS)
PEERS = ("pyhessian", "pyhessian-graph", "eigenthings", "curvlinops")


class Setting(NamedTuple):
    """What every cell of one table has in common."""

    examples: int
    batch_size: int
    threads: int
    seed: int


class Cell(NamedTuple):
    model: str
    tool: str
    task: str
    method: str


def cells(models: tuple[str, ...], tools: tuple[str, ...], tasks: tuple[str, ...]) -> Iterator[Cell]:
    for model in models:
        for task in tasks:
            for tool in tools:
                for method in METHODS[tool].get(task, ()):
                    yield Cell(model, tool, task, method)


def matrix_of(task: str) -> str:
    """``H`` or ``F``."""
    return "F" if "_F" in task else "H"


def quantity_of(task: str) -> str:
    """The reference's name of what a task asks for: ``trace_H`` of ``trace_H_5``."""
    return "_".join(task.split("_")[:2])

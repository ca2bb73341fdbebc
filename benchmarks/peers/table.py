"""The results file as Markdown: every cell, and whether the aims are met. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peers.plan import METHODS, MODELS, PEERS, RADII, TASKS, TOLERANCE, TOOLS, quantity_of

AIM_PYHESSIAN, AIM_PEER, AIM_DEFAULTS, AIM_GRADIENTS = 10.0, 3.0, 5.0, 10.0
FOUR = ("lambda_H", "lambda_F", "trace_H_1", "trace_F_1")
TITLES = {
    "lambda_H": "λ_max(H) to 1 %",
    "lambda_F": "λ_max(F) to 1 %",
    "trace_H_5": "tr H to 5 %",
    "trace_H_1": "tr H to 1 %",
    "trace_F_5": "tr F to 5 %",
    "trace_F_1": "tr F to 1 %",
    "joint": "several in one call",
    "defaults": "defaults",
    "S": "max S_ρ",
}
SYMBOLS = {"lambda_H": "λ_max(H)", "lambda_F": "λ_max(F)", "trace_H": "tr H", "trace_F": "tr F", "S": "S_ρ"}

Line = dict[str, Any]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "—"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _cpu(line: Line) -> float | None:
    """CPU seconds: what the wall clock would have shown with one thread and no other work on the machine."""
    seconds = line.get("seconds")
    return None if seconds is None else seconds * line["busy"]


def _cpu_ratio(theirs: Sequence[Line], ours: Line) -> str:
    total = sum(_cpu(line) or 0.0 for line in theirs)
    return f"in CPU time {_number(total / (_cpu(ours) or float('nan')))}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Group:
    """The newest line of every cell of one model and setting."""

    def __init__(self, reference: Line, lines: Iterable[Line]) -> None:
        self.reference = reference
        self.truth: dict[str, float] = reference["truth"]
        self.cells: dict[tuple[str, str, str], Line] = {}
        for line in lines:
            _, tool, task, method = line["cell"]
            self.cells[tool, task, method] = line

    def error(self, quantity: str, figure: Line) -> float | None:
        truth, value = self.truth.get(quantity), figure["value"]
        return None if truth is None or value is None else value / truth - 1

    def errors(self, line: Line) -> dict[str, float]:
        found = {quantity: self.error(quantity, figure) for quantity, figure in line["figures"].items()}
        return {quantity: abs(error) for quantity, error in found.items() if error is not None}

    def best(self, tools: Iterable[str], task: str) -> Line | None:
        """The fastest cell of a task, run or projected, that has reached its tolerance."""
        found = []
        for tool in tools:
            for method in METHODS[tool].get(task, ()):
                line = self.cells.get((tool, task, method))
                if line is None or line["status"] not in ("ran", "projected"):
                    continue
                # ARPACK's tolerance is no promise; of a trace one run may be outside of its standard error
                errors = self.errors(line).values()
                if task.startswith("lambda") and max(errors, default=1.0) > TOLERANCE[task]:
                    continue
                found.append(line)
        return min(found, key=lambda line: line["seconds"], default=None)

    # --- tables

    def rows(self) -> Iterable[list[str]]:
        for task in TASKS:
            for tool in TOOLS:
                for method in METHODS[tool].get(task, ()):
                    line = self.cells.get((tool, task, method))
                    if line is not None:
                        yield from self._rows(task, line)

    def _rows(self, task: str, line: Line) -> Iterable[list[str]]:
        _, tool, _, method = line["cell"]
        status, note = line["status"], line.get("note", "")
        if status == "failed":
            yield [TITLES[task], f"{tool}, {method}", "failed", *["—"] * 7, note]
            return
        unit, seconds, cpu = line["gradient_cpu_seconds"], line.get("seconds"), _cpu(line)
        for index, (quantity, figure) in enumerate(line["figures"].items()):
            error = self.error(quantity, figure)
            remarks = [] if status == "ran" else [f"**{status}**"]
            if figure.get("converged") is False:
                remarks.append("says it has not converged")
            if figure.get("stderr") is not None:
                remarks.append(f"± {_number(figure['stderr'])}")
            each = line.get("per_product")
            if each is not None:
                remarks.append(f"a product is {each * line['busy'] / unit:.1f} gradients")
            products = line.get("products")
            work = (
                f"{_number(products, 4)} products"
                if products is not None
                else f"{_number(figure['num_evals'])} evals"
                if "num_evals" in figure
                else "—"
            )
            if tool == "paper":
                work = f"{line['evaluations']} evals"
            first = index == 0
            yield [
                TITLES[task] if first else "",
                f"{tool}, {method}" if first else "",
                SYMBOLS[quantity],
                ("≈ " if status == "projected" else "") + _number(seconds) if first else "",
                _number(cpu) if first else "",
                _number(None if cpu is None else cpu / unit) if first else "",
                work,
                f"{line['peak_mebibytes']:.0f}" if first else "",
                _number(figure["value"], 5),
                "—" if error is None else f"{100 * error:+.2g} %",
                "; ".join([*remarks, *([note] if note and first else [])]),
            ]

    # --- aims

    def aims(self) -> Iterable[str]:
        ours = self.cells.get(("ours", "joint", "all_1"))
        if ours is not None and ours["status"] == "ran":
            yield self._ours(ours)
            yield self._against_pyhessian(ours)
            yield from self._against_peers(ours)
        yield from self._against_defaults()
        for rho in RADII:
            yield from self._inconsistency(rho)

    def _ours(self, ours: Line) -> str:
        errors = self.errors(ours)
        kept = len(errors) == len(ours["figures"])
        for quantity, figure in ours["figures"].items():
            # a standard error of 1 % is what was asked of a trace: one run in three is further off than that
            allowed = max(0.01, 2 * (figure["stderr"] or 0) / abs(self.truth[quantity]))
            kept = kept and figure["converged"] and errors[quantity] <= min(allowed, 0.02)
        verdict = "as asked" if kept else "**not to the 1 % that was asked**"
        return f"ours, all four in one call: {_number(ours['seconds'])} s; {_off(errors)}: {verdict}"

    def _chosen(self, tools: Iterable[str], tasks: Iterable[str]) -> list[Line]:
        """The fastest way to each task; empty where there is none to one of them."""
        tools = tuple(tools)
        found = [self.best(tools, task) for task in tasks]
        return [] if None in found else [line for line in found if line is not None]

    def _ratio(self, what: str, ours: Line, theirs: Sequence[Line], aim: float) -> str:
        if not theirs:
            return f"{what}: 1 % was not reached in the time given, or has not run"
        ways = [
            f"{SYMBOLS[quantity_of(line['cell'][2])]}: {line['cell'][1]} {line['cell'][3]}" for line in theirs
        ]
        about = "≈ " if any(line["status"] == "projected" for line in theirs) else ""
        seconds = _seconds(theirs)
        verdict = _verdict(seconds / ours["seconds"], aim)
        return f"{what} ({'; '.join(ways)}): {about}{_number(seconds)} s, ratio {verdict}; {_cpu_ratio(theirs, ours)}"

    def _against_pyhessian(self, ours: Line) -> str:
        theirs = self._chosen(("pyhessian", "pyhessian-graph"), ("lambda_H", "trace_H_1"))
        return self._ratio("against PyHessian's λ_max(H) and tr H alone", ours, theirs, AIM_PYHESSIAN)

    def _against_peers(self, ours: Line) -> Iterable[str]:
        able = [self._chosen((tool,), FOUR) for tool in PEERS]
        best = min((lines for lines in able if lines), key=_seconds, default=[])
        yield self._ratio("against the best single peer, all four", ours, best, AIM_PEER)
        what = "against the best of all peers for each figure (stricter than the aim)"
        yield self._ratio(what, ours, self._chosen(PEERS, FOUR), AIM_PEER)

    def _against_defaults(self) -> Iterable[str]:
        """Each peer's default calls, alone and as a pair, against the fastest of ours whose errors are smaller."""
        for tool in PEERS:
            methods = METHODS[tool]["defaults"]
            traces = [method for method in methods if method.startswith("trace")]
            others = [method for method in methods if method not in traces]
            for chosen in [*((m,) for m in methods), *((m, t) for m in others for t in traces)]:
                yield from self._against_default(tool, chosen)

    def _against_default(self, tool: str, methods: tuple[str, ...]) -> Iterable[str]:
        theirs = [self.cells.get((tool, "defaults", method)) for method in methods]
        ran = [line for line in theirs if line is not None and line["status"] == "ran"]
        if len(ran) < len(methods):
            return
        errors = {q: e for line in ran for q, e in self.errors(line).items()}
        if len(methods) == 2:
            keys = [("joint", "H_5"), ("joint", "H_1")]
        else:
            keys = [
                (t, "measure") for t in ("lambda_H", "trace_H_5", "trace_H_1") if quantity_of(t) in errors
            ]
        found = [self.cells.get(("ours", *key)) for key in keys]
        ours = [line for line in found if line is not None and line["status"] == "ran"]
        if not ours:
            return
        seconds = _seconds(ran)
        text = f"against {tool}'s default {' and '.join(methods)}: {_number(seconds)} s, {_off(errors)}; ours"
        better = [line for line in ours if all(self.errors(line).get(q, 1.0) <= e for q, e in errors.items())]
        if not better:
            best = min(ours, key=lambda line: max(self.errors(line).values(), default=1.0))
            yield f"{text} {_number(best['seconds'])} s, {_off(self.errors(best))}: **missed** (larger error)"
            return
        best = min(better, key=lambda line: line["seconds"])
        ratio = _verdict(seconds / best["seconds"], AIM_DEFAULTS)
        yield f"{text} {_number(best['seconds'])} s, {_off(self.errors(best))}; ratio {ratio}; {_cpu_ratio(ran, best)}"

    def _inconsistency(self, rho: float) -> Iterable[str]:
        ours, paper = (self.cells.get((tool, "S", f"rho={rho}")) for tool in ("ours", "paper"))
        if ours is None or paper is None or "failed" in (ours["status"], paper["status"]):
            return
        value, best = ours["figures"]["S"]["value"], paper["figures"]["S"]["value"]
        met = "met" if value >= best else f"**missed** by {100 * (1 - value / best):.2g} %"
        yield (
            f"max S_ρ, ρ = {rho}: converged {_number(value, 5)} against {_number(best, 5)}, the best end of "
            f"Algorithm 1's {len(paper['ends'])} starts × 15 steps ({100 * (value / best - 1):+.2g} %; on its way it "
            f"saw {_number(paper['highest_on_the_way'], 5)}): {met}"
        )
        about = "≈ " if paper["status"] == "projected" else ""
        for what, count, seconds in (
            ("alone", ours["evaluations"], ours["seconds"]),
            ("after λ_max(F)", ours["evaluations_after"], ours["seconds_after"]),
        ):
            ratio = paper["evaluations"] / count if count else float("inf")
            times = paper["seconds"] / seconds if seconds else float("inf")
            yield (
                f"max S_ρ, ρ = {rho}, {what}: {_number(count)} gradient evaluations against {paper['evaluations']}, "
                f"ratio {_verdict(ratio, AIM_GRADIENTS)}; {_number(seconds)} s against {about}"
                f"{_number(paper['seconds'])} s, ratio {_number(times)}"
            )


def _seconds(lines: Sequence[Line]) -> float:
    return sum(line["seconds"] for line in lines)


def _off(errors: dict[str, float]) -> str:
    return ", ".join(f"{SYMBOLS[quantity]} off by {100 * error:.2g} %" for quantity, error in errors.items())


def _verdict(ratio: float, aim: float) -> str:
    if ratio >= aim:
        return f"{ratio:.3g} (aim {aim:g}: met, {ratio / aim:.2g} times the aim)"
    return f"{ratio:.3g} (aim {aim:g}: **missed**, {ratio / aim:.0%} of the aim)"


HEADER = (
    "task",
    "tool, method",
    "figure",
    "seconds",
    "CPU s",
    "in gradients",
    "work",
    "peak MiB",
    "value",
    "true error",
    "remarks",
)


def render(lines: Sequence[Line]) -> str:
    """Everything in the results file, one section a model and setting."""
    parts = []
    environments = [line for line in lines if line["kind"] == "environment"]
    for line in environments[-1:]:
        facts = ", ".join(f"{name} {value}" for name, value in line["environment"].items())
        parts.append(f"{facts}; {line['date']}.")
    references = [line for line in lines if line["kind"] == "reference"]
    for reference in sorted(references, key=lambda line: (MODELS.index(line["model"]), line["setting"])):
        own = [
            line
            for line in lines
            if line["kind"] == "cell"
            and all(line[key] == reference[key] for key in ("model", "checkpoint", "setting", "data"))
        ]
        group = _Group(reference, own)
        examples, batch_size, threads, seed = reference["setting"]
        truth = group.truth
        parts.append(
            f"## {reference['model']}, {examples} images in batches of {batch_size}, {threads} thread(s), seed {seed}"
        )
        parts.append(
            f"{reference['num_parameters']:,} parameters, accuracy {truth['accuracy']:.3f}, CE "
            f"{truth['cross_entropy']:.4g}. In float64: λ_max(H) = {truth['lambda_H']:.8g}, λ_max(F) = "
            f"{truth['lambda_F']:.8g} (relative bounds {truth['lambda_H_bound']:.0e}, {truth['lambda_F_bound']:.0e}), "
            f"tr H = tr F = {truth['trace_F']:.8g} (diagonals equal to {truth['diagonal_gap']:.0e} on 4 images)."
        )
        parts.append(_markdown(HEADER, group.rows()))
        parts.append("\n".join(f"- {aim}" for aim in group.aims()))
    return "\n\n".join(parts)

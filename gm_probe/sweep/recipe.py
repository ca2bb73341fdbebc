"""Recipes: a TOML file that names a base configuration, a design over it, and what to measure at the end."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from gm_probe.checks import whole
from gm_probe.data.names import require_data_name
from gm_probe.errors import UsageError, did_you_mean
from gm_probe.files.atomic import read_toml
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.names import check_names, default_measures, expanded, unknown_measure
from gm_probe.measures.settings import Settings
from gm_probe.models.names import require_model_name
from gm_probe.runtime.names import require_device_name
from gm_probe.sweep.design import DESIGNS, points, require_known
from gm_probe.training.config import SETTINGS, TrainConfig

_SHORT = {"batch_size": "bs", "weight_decay": "wd", "seed": "s", "method": "", "model": ""}


@dataclass(frozen=True)
class MeasurePlan:
    """What to measure of every trained run, over its unlabeled part.

    ``max_examples`` takes a seeded random subset of it; ``batch_size`` changes memory and speed only, except of SimCLR
    encoders, where it is part of what is measured.
    """

    measures: tuple[str, ...]
    settings: Settings
    max_examples: int | None
    batch_size: int | None

    @property
    def scope(self) -> dict[str, Any]:
        """Over what a run is measured, as its measures.json says it."""
        from gm_probe.training.run_splits import (
            OWN_UNLABELED,  # torch, which a wrong recipe must not wait for
        )

        return {"part": OWN_UNLABELED, "max_examples": self.max_examples}

    @property
    def asked(self) -> dict[str, Any]:
        """Every setting that a run's measures.json must agree with."""
        return {**self.settings.as_dict(), **self.scope}

    @property
    def batch_dependent(self) -> dict[str, Any]:
        """Those that a SimCLR encoder's must agree with besides."""
        from gm_probe.data.batches import BATCH_SIZE

        return {"batch_images": self.batch_size or BATCH_SIZE}


@dataclass(frozen=True)
class Recipe:
    """Named runs in order, and the plan of measurement."""

    runs: dict[str, TrainConfig]
    plan: MeasurePlan
    group_by: tuple[str, ...]


def builtin_recipes() -> dict[str, str]:
    """Return the name and first comment line of every built-in recipe."""
    folder = resources.files("gm_probe") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a built-in recipe by name.

    Args:
        overrides: settings that replace the recipe's ``[base]``.

    Raises:
        UsageError: no such recipe, or an unknown or ill-typed setting in it, or data, a model or a device that there
            is not.
        StorageError: the file cannot be read or is not TOML.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in builtin_recipes():
            known = builtin_recipes()
            hint = did_you_mean(name, known, f"give a .toml file or one of {', '.join(known)}")
            raise UsageError(f"no recipe {name!r}; {hint}")
        with resources.as_file(resources.files("gm_probe") / "recipes" / f"{name}.toml") as file:
            content = read_toml(file, follow=True)
    else:
        content = read_toml(path, follow=True)
    recipe = parse_recipe(content, overrides)
    require_names(recipe.runs.values())
    return recipe


def require_names(configs: Collection[TrainConfig]) -> None:
    """Raise UsageError for data, a model or a device that there is not, before a run of many fails of it."""
    _check_each(
        configs, {"data": require_data_name, "device": require_device_name, "model": require_model_name}
    )
    from gm_probe.models.zoo import builder
    from gm_probe.runtime.devices import named_device  # torch, which a wrong name must not wait for

    _check_each(configs, {"model": builder, "device": named_device})


def _check_each(configs: Collection[TrainConfig], checks: Mapping[str, Callable[[str], Any]]) -> None:
    for setting, check in checks.items():
        for name in dict.fromkeys(getattr(config, setting) for config in configs):
            check(name)


def parse_recipe(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Expand ``[base]`` and the design into runs.

    Raises:
        UsageError: an unknown table, setting or measure.
    """
    known = ("base", *DESIGNS, "measure", "correlate")
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UsageError(
            f"recipe: unknown table [{unknown[0]}]; there are {', '.join(f'[{name}]' for name in known)}"
        )
    for table in set(content) - set(DESIGNS):
        if not isinstance(content[table], Mapping):
            raise UsageError(f"recipe: {table} = {content[table]!r} must be a table, [{table}]")
    base = {**content.get("base", {}), **(overrides or {})}
    runs: dict[str, TrainConfig] = {}
    names: dict[TrainConfig, str] = {}
    for values in points(content):
        both = sorted(set(base) & set(values))
        if both:
            raise UsageError(
                f"recipe: {both[0]} is both in [base] (or an option) and in the design; keep one"
            )
        config = TrainConfig.from_dict({**base, **values})
        name = run_name(config, values)
        same = names.setdefault(config, name)
        if name in runs or same != name:  # a point may also give a default that another leaves out
            raise UsageError(
                f"recipe: the design names the same run twice ({', '.join(dict.fromkeys([same, name]))})"
            )
        runs[name] = config
    plan = measure_plan(content.get("measure", {}))
    if views := [config for config in runs.values() if config.trains_encoder]:
        _require_of_views(plan, views)
    return Recipe(runs, plan, _group_by(content.get("correlate", {})))


def _require_of_views(plan: MeasurePlan, configs: Collection[TrainConfig]) -> None:
    """Raise UsageError for what of SimCLR encoders, ``configs``, cannot be measured, before they are trained."""
    check_names(plan.measures, labeled=True, batch_dependent=True)
    size = plan.batch_dependent["batch_images"]
    for config in configs if plan.measures else ():
        images = [n for n in (config.num_unlabeled, plan.max_examples) if n is not None]
        if images and min(images) < size:
            raise UsageError(
                f"recipe: NT-Xent is measured on batches of {size} images, but there are {min(images)}. "
                "Set measure.batch_size, or raise num_unlabeled or measure.max_examples"
            )


def _group_by(content: Mapping[str, Any]) -> tuple[str, ...]:
    require_known("correlate", content, ("group_by",))
    names = _names("correlate.group_by", content.get("group_by", []))
    for name in names:
        if name not in SETTINGS:
            raise UsageError(
                f"recipe: correlate.group_by: no setting {name!r}; {did_you_mean(name, SETTINGS)}"
            )
    return names


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"recipe: {key} = {value!r} must be a list of names")
    return tuple(value)


def measure_plan(content: Mapping[str, Any]) -> MeasurePlan:
    """Return the plan of a recipe's [measure] table; UsageError for what is no setting or measure."""
    known = {field.name for field in fields(Settings)}
    require_known("measure", content, ("measures", "max_examples", "batch_size", *sorted(known)))
    given = _names("measure.measures", content.get("measures", default_measures(labeled=False)))
    names = tuple(expanded(given, labeled=False))
    for name in names:
        if name not in MEASURES:
            raise UsageError(f"recipe: {unknown_measure(name)}")
        if MEASURES[name].needs_labels:
            raise UsageError(f"recipe: {name} needs labels, but a sweep measures on the unlabeled part")
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content.items()
        if key in known
    }
    sizes = {key: content[key] for key in ("max_examples", "batch_size") if key in content}
    for key, value in sizes.items():
        whole(f"recipe: measure.{key}", value)
    try:
        settings = Settings(**chosen)
    except UsageError as error:
        raise UsageError(f"recipe: measure.{error}") from error
    return MeasurePlan(names, settings, sizes.get("max_examples"), sizes.get("batch_size"))


def run_name(config: TrainConfig, varied: Mapping[str, Any]) -> str:
    """Return a readable name that ends in a hash of everything the run computes from."""
    digest = hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()[:8]
    parts = [f"{_SHORT.get(key, key)}{_plain(value)}" for key, value in varied.items()]
    return "-".join(filter(None, ["-".join(parts)[:120], digest]))


def _plain(value: Any) -> str:
    """Return a value in characters that any file system takes, no dot in front (it would hide the folder)."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isascii() and (c.isalnum() or c in ".+-") else "_" for c in text).lstrip(".")[:40]

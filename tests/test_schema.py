"""What records may say: each kind with values that fit and others that do not, and bounds for all."""

import math
import time
from typing import Any, get_args, get_type_hints

import pytest

from gm_probe.files import schema
from gm_probe.files.schema import Check, Unfit, bounded
from gm_probe.measures.settings import Settings
from gm_probe.runs.record_kinds import CONFIG_KIND, MEASURED_SETTING_KINDS, SETTING_KINDS, SWEEP_KIND
from gm_probe.training.config import TrainConfig

KINDS: dict[str, tuple[Check, list[Any], list[Any]]] = {
    "number": (schema.number, [1, -2.5, math.nan, math.inf], [True, "1", None, [1]]),
    "finite": (schema.finite, [0, -1e300], [math.nan, -math.inf, False]),
    "between": (schema.between(0, 2), [0, 2, 1.5], [-1, 2.1, math.nan, True]),
    "count": (schema.count, [0, 2**40], [-1, 1.0, True, "3"]),
    "text": (schema.text, ["", "a"], [1, None, ["a"]]),
    "flag": (schema.flag, [True, False], [0, 1, "true", None]),
    "scalar": (schema.scalar, [1, "a", True, 0.5], [None, [], {}]),
    "optional": (schema.optional(schema.flag), [None, True], [1, "x"]),
    "one_of": (schema.one_of("a", "b"), ["a", "b"], ["c", 1, ["a"], None]),
    "listed": (schema.listed(schema.count), [[], [1, 2]], [1, "12", [1, "2"], {"a": 1}]),
    "mapping": (schema.mapping(schema.count, refused=["run"], most=2), [{}, {"a": 1}], [[], {"run": 1}, {"a": ""},
                dict.fromkeys("abc", 1)]),
    "either": (schema.either("x", schema.flag, schema.count), [True, 3], ["a", -1, None]),
    "table": (schema.table({"a": schema.count}, required=["a"]), [{"a": 1}, {"a": 1, "b": []}], [{}, {"a": "1"}, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_takes_what_fits_and_names_the_place_of_what_does_not(name: str) -> None:
    check, fitting, others = KINDS[name]
    for value in fitting:
        check(value, "here")
    for value in others:
        with pytest.raises(Unfit, match=r"^here"):
            check(value, "here")


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


UNBOUNDED: dict[str, tuple[Any, str]] = {
    "levels": (nested(100_000), "is nested in more than 16 levels"),
    "a long name": ({"a": {"n" * 100_000: 1}}, "a has the key n+… of 100,000 characters"),
    "a long text": ({"a": "t" * 100_000}, "a has 100,000 characters"),
    "a huge integer": ({"a": [1, 10**5000]}, "a is an integer beyond 64 bits"),
    "a name that steers": ({"\x1b[2J": 1}, r"the key \\x1b\[2J, with unprintable characters"),
    "bytes": ({"a": b"x"}, "a is a bytes"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_would_exhaust_a_reader_is_refused_in_a_short_line(name: str) -> None:
    value, message = UNBOUNDED[name]
    began = time.perf_counter()
    with pytest.raises(Unfit, match=message) as caught:
        bounded(value)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()
    assert time.perf_counter() - began < 1


def test_bounds_take_the_tools_own_files_and_nan_where_it_may_be() -> None:
    bounded({"a": [[1, 2.5], None, "x", {"b": True}], "c": -(2**63)})
    bounded([math.nan])
    for value in (math.nan, [1, math.inf], {"a": [[-math.inf]]}):
        with pytest.raises(Unfit, match="not finite"):
            bounded(value, nan=False)


OF_TYPE = {int: (3, "3"), float: (0.5, "x"), str: ("x", 1), bool: (True, "x"), tuple: ([1], ["x"])}


def kinds_of(hint: Any) -> set[type]:
    found = {getattr(each, "__origin__", each) for each in get_args(hint)} - {type(None), Ellipsis}
    return {tuple} if getattr(hint, "__origin__", None) is tuple else found or {hint}


@pytest.mark.parametrize("name", get_type_hints(TrainConfig))
def test_a_configs_schema_is_that_of_the_settings(name: str) -> None:
    (kind,) = kinds_of(get_type_hints(TrainConfig)[name])
    good, bad = OF_TYPE[kind]
    SETTING_KINDS[name](good, name)
    with pytest.raises(Unfit, match=rf"^{name}"):
        CONFIG_KIND({name: bad}, "")
    default = TrainConfig().as_dict()[name]
    SETTING_KINDS[name](default, name)


def test_schemas_name_no_other_settings() -> None:
    assert set(SETTING_KINDS) == set(get_type_hints(TrainConfig))
    assert set(Settings().as_dict()) <= set(MEASURED_SETTING_KINDS)
    for name, value in Settings().as_dict().items():
        MEASURED_SETTING_KINDS[name](value, name)


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../../b", "", ".", "a\0b", "..\\x", "C:\\x"])
def test_a_sweeps_run_lies_in_its_folder(name: str) -> None:
    record: dict[str, Any] = {"runs": {"good": {}}, "measures": [], "settings": {}}
    SWEEP_KIND(record, "")
    with pytest.raises(Unfit, match=r"not a folder inside the sweep|unprintable"):
        SWEEP_KIND({**record, "runs": {name: {}}}, "")

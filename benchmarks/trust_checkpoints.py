"""Hostile and broken checkpoints: none may run code, each is refused in one line and little memory."""

from __future__ import annotations

import functools
import io
import json
import operator
import os
import pickle
import random
import struct
import subprocess
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from trust_run import NOISE, Ran, Row, digits, fork, gmprobe, one_line, warm

from gm_probe.data.normalization import Normalization
from gm_probe.models.checkpoints import HEADER, save_checkpoint
from gm_probe.models.zoo import ModelSpec, build_model

SPEC = ModelSpec("mlp-8", (1, 8, 8), 10)
GIB = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00@\x85R."  # a pickle that asks for a gibibyte
BIG = 4_000_000  # values of a tensor, where the size of the file should show


# ---- files


def whole(value: Any, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """``value`` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return buffer.getvalue()


def rezipped(
    content: bytes,
    edit: Callable[[str, bytes], bytes] = lambda _, data: data,
    method: int = zipfile.ZIP_STORED,
    more: tuple[tuple[str, bytes], ...] = (),
) -> bytes:
    """A zip file's records, edited, and ``more``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
        with warnings.catch_warnings(action="ignore"):  # of names that are there twice
            for name, data in more:
                new.writestr(name, data)
    return buffer.getvalue()


class Disguised:
    """A tensor that is unpickled with attributes in its methods' place."""

    def __init__(self, tensor: torch.Tensor, **attributes: Any) -> None:
        self.tensor, self.attributes = tensor, attributes

    def __reduce__(self) -> Any:
        build, values = self.tensor.__reduce_ex__(2)
        return torch._tensor._rebuild_from_type_v2, (build, torch.Tensor, values, self.attributes)


def renamed(content: bytes, name: str) -> bytes:
    """A torch zip file whose pickle has another ``name``: torch's reader finds it whatever its case."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {old.replace("data.pkl", name): archive.read(old) for old in archive.namelist()}
    return _zip(records)


def with_pickle(data: bytes) -> bytes:
    """A torch zip file whose data.pkl is ``data``."""
    return rezipped(whole({"w": torch.ones(2)}), lambda name, old: data if name.endswith("data.pkl") else old)


def safe(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors of this header (JSON, or bytes as they are)."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def model_state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in build_model(SPEC).state_dict().items()}


def recorded(**changes: Any) -> bytes:
    """A whole .pt of gm_probe's whose record is changed."""
    record = {"model": SPEC.as_dict(), "mean": [], "std": [], "classes": []}
    return whole({"state_dict": model_state(), HEADER: json.dumps({**record, **changes})})


# ---- what runs code when it is unpickled without care


class Call:
    """Pickled, it is a call of ``function`` on ``arguments``."""

    def __init__(self, function: Any, *arguments: Any, **more: Any) -> None:
        self.call = (function, arguments, *more.values())

    def __reduce__(self) -> Any:
        return self.call


def touch(canary: Path) -> Call:
    return Call(os.system, f"touch '{canary}'")


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def opcodes(canary: Path) -> dict[str, bytes]:
    """Pickles by hand: every way in which one can name and call a function."""
    shell = f"touch '{canary}'".encode()
    word = b"X" + struct.pack("<I", len(shell)) + shell
    short = lambda text: b"\x8c" + bytes([len(text)]) + text  # noqa: E731
    line = b"V" + shell + b"\n"
    return {
        "GLOBAL REDUCE": b"\x80\x02cposix\nsystem\n" + word + b"\x85R.",
        "STACK_GLOBAL REDUCE": b"\x80\x04" + short(b"posix") + short(b"system") + b"\x93" + word + b"\x85R.",
        "INST": b"(" + line + b"iposix\nsystem\n.",
        "OBJ": b"\x80\x02(cposix\nsystem\n" + word + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + b"X\x02\x00\x00\x00id" + b"t\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n)}" + short(b"args") + word + b"s\x92.",
        "BUILD": b"\x80\x02ctypes\nSimpleNamespace\n)R}X\x01\x00\x00\x00acposix\nsystem\ns(" + word + b"tb.",
        "EXT1": b"\x80\x02\x82\xf0" + word + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + word + b"\x85R.",
        "PERSID": b"P" + shell + b"\n.",
        "BINPERSID": b"\x80\x02(X\x06\x00\x00\x00modulecposix\nsystem\n" + word + b"tQ.",
        "dotted name": b"\x80\x04" + short(b"torch.serialization") + short(b"os.system") + b"\x93" + word + b"\x85R.",
        "dotted GLOBAL": b"\x80\x02ctorch\nserialization.os.system\n" + word + b"\x85R.",
        "memo": b"\x80\x02cposix\nsystem\nq\x00" + word + b"\x85q\x01h\x00h\x01R.",
        "two pickles": b"\x80\x02}.cposix\nsystem\n" + word + b"\x85R.",
        "after STOP of a state": pickle.dumps({}, 2) + b"cposix\nsystem\n" + word + b"\x85R.",
        "attributes that hide methods": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsctorch\nSize\n"
        b"sX\x03\x00\x00\x00getctorch\nTensor\nsb.",
        "torch's own rebuilders": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n("
        + word + b"t}tR.",
        "a wrapper subclass": b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n(cposix\nsystem\n" + word + b"tR.",
        "Python 2 name": b"c__builtin__\neval\n(V" + code(canary).encode() + b"\ntR.",
    }  # fmt: skip


def calls(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling calls something that runs code, or leads to it."""
    hidden = OrderedDict(w=torch.ones(1))
    hidden._metadata = touch(canary)  # type: ignore[attr-defined]
    surprised = torch.ones(1)
    surprised.surprise = touch(canary)  # type: ignore[attr-defined]
    inner = pickle.dumps(touch(canary))
    state = {"w": torch.ones(1)}
    graph = {"_code": "import os\n" + code(canary)}
    return {
        "os.system": touch(canary),
        "subprocess": Call(subprocess.run, ["touch", str(canary)]),
        "eval": Call(eval, code(canary)),
        "exec": Call(exec, code(canary)),
        "compile": Call(compile, code(canary), "a", "exec"),
        "open": Call(open, str(canary), "w"),
        "getattr": Call(getattr, Path(canary), "touch"),
        "__import__": Call(__import__, "antigravity"),
        "functools.partial": Call(functools.partial, os.system, f"touch '{canary}'"),
        "map": Call(list, Call(map, os.system, [f"touch '{canary}'"])),
        "operator.methodcaller": Call(operator.methodcaller, "touch"),
        "runpy": Call(__import__("runpy").run_path, str(canary)),
        "pickle.loads": Call(pickle.loads, inner),
        "numpy reconstruct": np.array([touch(canary)], dtype=object),
        "numpy.load": Call(np.load, str(canary), None, True),
        "torch.load": Call(torch.load, str(canary)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, inner),
        "torch.hub.load": Call(torch.hub.load, "a/b", "c"),
        "torch.jit.load": Call(torch.jit.load, str(canary)),
        "torch.fx reduce": Call(torch.fx.graph_module.reduce_graph_module, graph, "import os"),
        "torch.utils.cpp_extension": Call(_by_name("torch.utils.cpp_extension", "load_inline"), "a", ""),
        "torch.utils.collect_env": Call(_by_name("torch.utils.collect_env", "run"), f"touch '{canary}'"),
        "a module": nn.Linear(1, 1),
        "in a state dict": {"state_dict": {**state, "x": touch(canary)}},
        "beside a state dict": {"state_dict": state, "args": [1, (touch(canary),)]},
        "as a key": {"state_dict": state, ("k", 1): {"a": touch(canary)}},
        "in _metadata": hidden,
        "as a tensor's attribute": {"w": surprised},
        "as the record": {"state_dict": state, HEADER: touch(canary)},
        "in an optimizer": {"state_dict": state, "optimizer": {"state": {0: {"m": touch(canary)}}}},
    }


def _by_name(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name)


def hostile(canary: Path) -> dict[str, bytes]:
    """Files that run code where they are let, by name."""
    files = {}
    for name, value in calls(canary).items():
        files[f"{name}, zip"] = whole(value)
        files[f"{name}, legacy"] = whole(value, legacy=True)
    for name, data in opcodes(canary).items():
        files[f"{name}, zip"] = with_pickle(data)
        files[f"{name}, bare pickle"] = data
    for protocol in (0, 1, 2, 3, 4, 5):
        files[f"os.system, bare pickle {protocol}"] = pickle.dumps(touch(canary), protocol)
    files["os.system, zip, protocol 4"] = whole(touch(canary), protocol=4)
    return files


# ---- what is broken, or no weights


def broken(folder: Path) -> dict[str, bytes]:
    """Files by name; the suffix says as what they are read."""
    state = model_state()
    big = {"w": torch.arange(float(BIG))}
    plain, legacy, large = whole(state), whole(state, legacy=True), whole(big)
    tensors, huge = safetensors.torch.save(state), safetensors.torch.save(big)
    spoiled = {name: value.clone() for name, value in state.items()}
    first = next(iter(spoiled))
    word = next(iter(state))
    poison = {**state, word: torch.full_like(state[word], float("nan"))}
    infinite = {**state, word: torch.full_like(state[word], float("inf"))}
    late = big["w"].clone()
    late[-1] = float("nan")
    missing = {name: value for name, value in state.items() if name != first}
    laugh = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    flipped = bytearray(plain)
    flipped[len(plain) // 3] ^= 255
    index = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    files = {
        "empty.pt": b"",
        "empty.safetensors": b"",
        "one byte.pt": b"\x80",
        "text.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n",
        "html.pt": b"<!DOCTYPE html>\n<html>not found</html>",
        "zeros.pt": bytes(1000),
        "noise.pt": random.Random(0).randbytes(5000),
        "gzip.pt": b"\x1f\x8b\x08" + bytes(100),
        "image.pt": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "hdf5.pt": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "only the zip's magic.pt": b"PK\x03\x04" + bytes(60),
        "empty zip.pt": rezipped(_zip({})),
        "other zip.pt": _zip({"a.txt": b"hi"}),
        "zip without pickle.pt": _zip({"archive/data/0": bytes(8), "archive/version": b"3"}),
        "two pickles of one name.pt": rezipped(plain, more=((_pickle_name(plain), b"\x80\x02}."),)),
        "path out of the zip.pt": _zip({"../../evil/data.pkl": b"\x80\x02}."}),
        "deflated.pt": rezipped(whole({"w": torch.zeros(BIG)}), method=zipfile.ZIP_DEFLATED),
        "bomb in a record beside.pt": rezipped(plain, method=zipfile.ZIP_DEFLATED, more=(("a", bytes(10**8)),)),
        "bytearray of 1 GiB.pt": with_pickle(GIB),
        "bytearray, legacy.pt": GIB,
        "tensor of 1 GiB of nothing.pt": with_pickle(
            b"\x80\x02}X\x01\x00\x00\x00wctorch\nFloatTensor\nJ\x00\x00\x00\x10\x85\x81s."
        ),
        "expanded tensor.pt": whole({"w": torch.ones(1).expand(10**9)}),
        "storage of another size.pt": with_pickle(_data(whole({"w": torch.ones(3)}))),
        "string of 4 GiB.pt": with_pickle(b"\x80\x02X\xff\xff\xff\xffabc."),
        "memo.pt": with_pickle(b"\x80\x02K\x01r\xff\xff\xff\xff."),
        "lists 100,000 deep.pt": with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "dicts 50,000 deep.pt": with_pickle(
            b"\x80\x02}X\x05\x00\x00\x00model" + b"}X\x05\x00\x00\x00model" * 50_000 + b"}" + b"s" * 50_001 + b"."
        ),
        "key 100,000 deep.pt": with_pickle(b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."),
        "key of 2^60 parts.pt": with_pickle(b"\x80\x02}()" + laugh + b"K\x01u."),
        "key of 2^60 parts in Data.pkl.pt": renamed(with_pickle(b"\x80\x02}()" + laugh + b"K\x01u."), "Data.pkl"),
        "bytearray of 1 GiB in DATA.PKL.pt": renamed(with_pickle(GIB), "DATA.PKL"),
        "data.pkl and DATA.PKL.pt": _zip({"a/data.pkl": _data(plain), "a/DATA.PKL": GIB, "a/version": b"3"}),
        "NaN behind an attribute.pt": whole({**state, word: Disguised(poison[word], detach=torch.Size)}),
        "key of 2^60 parts, legacy.pt": b"\x80\x02}()" + laugh + b"K\x01u.",
        "key of 100^9 parts.pt": with_pickle(b"\x80\x02}(" + b"".join(
            b"(" + (b"h" + bytes([i]) if i else b")") * 100 + b"tq" + bytes([i + 1]) for i in range(9)) + b"K\x01u."),
        "itself.pt": whole(_itself()),
        "truncated at a tenth.pt": plain[: len(plain) // 10],
        "truncated at half.pt": plain[: len(plain) // 2],
        "truncated by 1.pt": plain[:-1],
        "truncated, large.pt": large[: len(large) // 2],
        "truncated legacy at half.pt": legacy[: len(legacy) // 2],
        "truncated legacy by 10.pt": legacy[:-10],
        "bit flips.pt": bytes(flipped),
        "truncated at half.safetensors": tensors[: len(tensors) // 2],
        "truncated by 1.safetensors": tensors[:-1],
        "truncated, large.safetensors": huge[: len(huge) // 2],
        "bytes after the end.safetensors": tensors + bytes(100),
        "pickle.safetensors": plain,
        "safetensors.pt": tensors,
        "header of 4 EiB.safetensors": safe(b"{}", length=2**62),
        "header of 99 MB of nothing.safetensors": safe(b"{" + b" " * 99_000_000),
        "header beyond the file.safetensors": safe({"w": index}, length=1000),
        "no json.safetensors": safe(b"notjson!"),
        "json list.safetensors": safe([]),
        "json 100,000 deep.safetensors": safe(b"[" * 100_000),
        "no tensors.safetensors": safetensors.torch.save({}),
        "offsets out of the file.safetensors": safe({"w": {**index, "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}),
        "offsets overlap.safetensors": safe({"v": index, "w": index}, bytes(8)),
        "offsets backwards.safetensors": safe({"w": {**index, "data_offsets": [8, 0]}}, bytes(8)),
        "shape overflows.safetensors": safe({"w": {**index, "shape": [2**32, 2**32, 2**32]}}, bytes(8)),
        "negative shape.safetensors": safe({"w": {**index, "shape": [-2]}}, bytes(8)),
        "unknown dtype.safetensors": safe({"w": {**index, "dtype": "F7"}}, bytes(8)),
        "name twice.safetensors": safe(
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            bytes(16),
        ),
        "number.pt": whole(3),
        "list.pt": whole([torch.ones(2)]),
        "tensor.pt": whole(torch.ones(2)),
        "nothing.pt": whole({}),
        "no tensors.pt": whole({"epoch": 3, "weights": {"w": torch.ones(1)}}),
        "keys are numbers.pt": whole({0: torch.ones(1)}),
        "only an optimizer.pt": whole({"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}),
        "nan.pt": whole(poison),
        "nan.safetensors": safetensors.torch.save(poison),
        "inf.pt": whole(infinite),
        "nan at the end of 16 MB.pt": whole({"w": late}),
        "nan at the end of 16 MB.safetensors": safetensors.torch.save({"w": late}),
        "fp8 nan.pt": whole({**state, word: torch.full(state[word].shape, float("nan")).to(torch.float8_e4m3fn)}),
        "shape of another.pt": whole({**state, word: torch.ones(3, 3)}),
        "scalar in place of a matrix.pt": whole({**state, word: torch.tensor(1.0)}),
        "a tensor missing.pt": whole(missing),
        "a tensor too much.pt": whole({**state, "extra.weight": torch.ones(2)}),
        "16 MB of another network.pt": large,
        "all tensors of another name.pt": whole({f"{name}s": value for name, value in state.items()}),
        "a stack of 50,000 models.pt": whole([{"a": [{"b": torch.ones(0)}]} for _ in range(50_000)]),
        "meta.pt": whole({**state, word: torch.ones(3, device="meta")}),
        "complex.pt": whole({name: value.to(torch.complex64) for name, value in state.items()}),
        "int8.pt": whole({name: torch.ones_like(value, dtype=torch.int8) for name, value in state.items()}),
        "int64.pt": whole({name: torch.ones_like(value, dtype=torch.int64) for name, value in state.items()}),
        "bool.pt": whole({name: torch.ones_like(value, dtype=torch.bool) for name, value in state.items()}),
        "quantized.pt": whole({"w": quantized}),
        "sparse.pt": whole({"w": torch.eye(3).to_sparse()}),
        "zero-size.pt": whole({name: value[:0] for name, value in state.items()}),
        "zero-size.safetensors": safetensors.torch.save({name: value[:0] for name, value in state.items()}),
        "no weight matrix.pt": whole({"b": torch.ones(3)}),
        "record of no network.pt": recorded(model={**SPEC.as_dict(), "name": "mlq-8"}),
        "record of a network of 4 TB.pt": recorded(model={**SPEC.as_dict(), "name": "mlp-1000000-1000000"}),
        "record of a billion classes.pt": recorded(model={**SPEC.as_dict(), "num_classes": 10**9}),
        "record of a network a million deep.pt": recorded(model={**SPEC.as_dict(), "name": "wrn-999994-1"}),
        "record of torchvision's unknown.pt": recorded(model={**SPEC.as_dict(), "name": "torchvision:resnet0"}),
        "record of a name of 5,000 digits.pt": recorded(model={**SPEC.as_dict(), "name": "mlp-" + "9" * 5000}),
        "record of a name of 400 kB.pt": recorded(model={**SPEC.as_dict(), "name": "mlp" + "-1" * 200_000}),
        "record with classes of numbers.pt": recorded(classes=[1, 2]),
        "record with classes in a text.pt": recorded(classes="0123456789"),
        "record with a class too few.pt": recorded(classes=["a"]),
        "record no json.pt": whole({"state_dict": state, HEADER: "{"}),
        "record 100,000 deep.pt": whole({"state_dict": state, HEADER: "[" * 100_000}),
        "record with std 0.pt": recorded(mean=[0.5], std=[0.0]),
        "record of numbers.pt": whole({"state_dict": state, HEADER: 3}),
        "names that forge a terminal.pt": whole({"w\x1b[2J\nall is well": torch.tensor([float("nan")])}),
        "name of a megabyte.pt": whole({"x" * 10**6: torch.tensor([float("nan")])}),
        "50,000 names.pt": with_pickle(_many(50_000)),
        "100,000 tensors of nothing.safetensors": safe(
            {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        scripted = folder / "scripted"
        torch.jit.script(nn.Linear(2, 2)).save(str(scripted))
    files["torchscript.pt"] = scripted.read_bytes()
    return files


def _many(count: int) -> bytes:
    """A pickled dict of so many names without a tensor."""
    return pickle.dumps({f"w{i}": 0 for i in range(count)}, 2)


def _zip(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _pickle_name(content: bytes) -> str:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return next(name for name in archive.namelist() if name.endswith("data.pkl"))


def _data(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(_pickle_name(content))


def _itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["model"] = value
    return value


def odd_paths(folder: Path) -> dict[str, Path]:
    """What lies where a file should."""
    (folder / "folder.pt").mkdir()
    (folder / "empty run").mkdir()
    os.mkfifo(folder / "fifo.pt")
    (folder / "loop.pt").symlink_to(folder / "loop.pt")
    (folder / "dangling.pt").symlink_to(folder / "gone")
    return {
        "a folder named .pt": folder / "folder.pt",
        "a folder without a run": folder / "empty run",
        "a FIFO": folder / "fifo.pt",
        "a device": Path("/dev/zero"),
        "a link to itself": folder / "loop.pt",
        "a link to nothing": folder / "dangling.pt",
        "nothing": folder / "gone.pt",
        "a name of 300 characters": folder / ("x" * 300),
    }


# ---- the count


def written(files: Callable[[], dict[str, bytes]], folder: Path, every: int) -> dict[str, Path]:
    """Every so manieth of ``files`` in ``folder`` by its name; made in a fork, so that this process stays small."""
    names = folder / "names"

    def write() -> None:
        paths = {}
        for index, (case, content) in enumerate(list(files().items())[::every]):
            paths[case] = folder / f"{index}{Path(case).suffix if '.' in case else '.pt'}"
            paths[case].write_bytes(content)
        names.write_text(json.dumps({case: str(path) for case, path in paths.items()}))

    folder.mkdir()
    ran = fork(write)
    assert ran.code == 0, ran.err
    return {case: Path(path) for case, path in json.loads(names.read_text()).items()}


def run(small: bool) -> tuple[list[Row], list[str]]:
    code_row = Row("files that would run code: no code was executed; exit 3, one line with file and reason")
    broken_row = Row(
        "broken files, unusable weights: exit 3, one line with file and reason, memory < 2 × file"
    )
    path_row = Row("paths that are no files: exit 3 (7 where the system refuses the name), one line")
    every = 12 if small else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm(folder)
        data, canary = digits(folder), folder / "canary"
        good = folder / "good.pt"
        save_checkpoint(good, build_model(SPEC), SPEC, Normalization())
        path = folder / "sings.pt"
        path.write_bytes(whole(touch(canary)))
        torch.load(path, weights_only=False)
        assert canary.exists(), "the canary is dead"
        canary.unlink()
        command = ["--unlabeled", data, "--no-normalize", "--measures", "parameter_norm", "-q"]

        def measured(path: Path, *, record: bool = False) -> Ran:
            return gmprobe("measure", path, *command, *([] if record else ["--model", "mlp-8"]), within=60)

        for case, path in written(lambda: hostile(canary), folder / "hostile", every).items():
            problem = one_line(measured(path), 3, path)
            code_row.add(case, "the canary sang" if canary.exists() else problem)
            canary.unlink(missing_ok=True)
        most = 0.0
        for case, path in written(lambda: broken(folder), folder / "broken", every).items():
            sound = measured(good)  # beside it: what this process holds by itself changes
            assert sound.code == 0, sound.err
            ran, size = measured(path, record=case.startswith("record")), path.stat().st_size
            above = ran.peak - sound.peak
            problem = one_line(ran, 3, path)
            if problem is None and above > 2 * size + NOISE:
                problem = f"took {above / 1e6:.0f} MB for a file of {size / 1e6:.2f} MB"
            broken_row.add(case, problem)
            if size > 10**7:
                most = max(most, above / size)
        for case, path in odd_paths(folder).items():
            refused = len(path.name) > 255
            path_row.add(
                case, one_line(measured(path), 7 if refused else 3, str(path)[: 150 if refused else None])
            )
    note = (
        f"the most that a file of over 10 MB took beyond a sound small one: {most:.2f} × its size "
        f"(allowed: 2 × and {NOISE >> 20} MiB)"
    )
    return [code_row, broken_row, path_row], [note]

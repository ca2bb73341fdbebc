"""Images and arrays of every odd kind: decoded as they should be, or refused by a line that names the file."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import struct
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin
from trust_checkpoints import GIB, Disguised, whole, with_pickle
from trust_run import Row, fork, gmprobe, one_line, warm

from gm_probe.data import images
from gm_probe.data.datasets import open_source
from gm_probe.errors import DataError

SIZE = 8
COUNT, BATCH = 4_000, 500
RED = (200, 30, 60)
Expected = tuple[float, ...] | None  # mean of each channel, (R, G, B) or grey; None = refused


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def plain(mode: str = "RGB", colour: Any = RED, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.new(mode, size, colour)


def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG by hand: its header may claim what its data does not hold."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def files() -> dict[str, tuple[bytes, Expected]]:
    """Content by file name, and what should come of it."""
    frames = [plain(colour=c) for c in (RED, (0, 0, 255), (0, 255, 0))]
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jpeg, whole = saved(noisy(), "JPEG"), saved(noisy(), "PNG")
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 10**6, zip=True)
    palette = plain().convert("P", palette=Image.Palette.ADAPTIVE)
    grey16 = Image.fromarray(np.full((SIZE, SIZE), 200 << 8, dtype=np.uint16))
    rgb16 = png(SIZE, SIZE, (b"\0" + struct.pack(">HHH", *(c << 8 for c in RED)) * SIZE) * SIZE, depth=16)
    lossy = (205.0, 24.0, 60.0)  # loosely: see ``near``
    huge = struct.pack(">HH", 60000, 60000)
    start = jpeg.index(b"\xff\xc0")
    bomb = jpeg[: start + 5] + huge + jpeg[start + 9 :]
    return {
        # decoded
        "rgb.png": (saved(plain(), "PNG"), RED),
        "rgb.bmp": (saved(plain(), "BMP"), RED),
        "rgb.ppm": (saved(plain(), "PPM"), RED),
        "rgb.webp": (saved(plain(), "WEBP", lossless=True), RED),
        "rgb.tif": (saved(plain(), "TIFF"), RED),
        "rgb, deflated.tiff": (saved(plain(), "TIFF", compression="tiff_adobe_deflate"), RED),
        "rgb.jpg": (saved(plain(), "JPEG", quality=100), RED),
        "progressive.jpg": (saved(plain(), "JPEG", quality=100, progressive=True), RED),
        "cmyk.jpg": (saved(plain("CMYK", (0, 225, 195, 55)), "JPEG", quality=100), (200, 23, 47)),
        "cmyk.tif": (saved(plain("CMYK", (0, 225, 195, 55)), "TIFF"), (200, 24, 47)),
        "ycbcr.jpg": (saved(plain().convert("YCbCr"), "JPEG", quality=100), RED),
        "grey.png": (saved(plain("L", 70), "PNG"), (70,)),
        "grey with alpha.png": (saved(plain("LA", (70, 9)), "PNG"), (70,)),
        "bilevel.png": (saved(plain("1", 1), "PNG"), (255,)),
        "bilevel, fax.tif": (saved(plain("1", 1), "TIFF", compression="group4"), (255,)),
        "alpha.png": (saved(plain("RGBA", (*RED, 5)), "PNG"), RED),
        "alpha.webp": (saved(plain("RGBA", (*RED, 255)), "WEBP", lossless=True), RED),
        "palette.png": (saved(palette, "PNG"), RED),
        "palette with transparency.png": (saved(palette, "PNG", transparency=b"\x00\x80\xff"), RED),
        "palette.gif": (saved(palette, "GIF"), RED),
        "palette.bmp": (saved(palette, "BMP"), RED),
        "16 bits, grey.png": (saved(grey16, "PNG"), (200,)),
        "16 bits, grey.tif": (saved(grey16, "TIFF"), (200,)),
        "16 bits, rgb.png": (rgb16, RED),
        "16 bits.pgm": (b"P5 8 8 65535\n" + struct.pack(">H", 200 << 8) * 64, (200,)),
        "animated.gif": (saved(frames[0], "GIF", **moving), RED),
        "animated.webp": (saved(frames[0], "WEBP", lossless=True, **moving), RED),
        "animated.png": (saved(frames[0], "PNG", **moving), RED),
        "pages.tif": (saved(frames[0], "TIFF", **moving), RED),
        "turned by exif.jpg": (saved(plain(), "JPEG", quality=100, exif=exif), RED),
        "broken exif.jpg": (saved(plain(), "JPEG", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), RED),
        "colour profile.png": (saved(plain(), "PNG", icc_profile=profile), RED),
        "broken colour profile.png": (saved(plain(), "PNG", icc_profile=b"no profile"), RED),
        "broken colour profile.jpg": (saved(plain(), "JPEG", quality=100, icc_profile=b"x" * 9), RED),
        "a png named.jpg": (saved(plain(), "PNG"), RED),
        "a jpeg named.png": (saved(plain(), "JPEG", quality=100), RED),
        "capitals.JPG": (saved(plain(), "JPEG", quality=100), RED),
        "one pixel.png": (saved(plain(size=(1, 1)), "PNG"), RED),
        "one pixel high.png": (saved(plain(size=(500, 1)), "PNG"), RED),
        "a space and ü.png": (saved(plain(), "PNG"), RED),
        "emoji 🎈.png": (saved(plain(), "PNG"), RED),
        "new\nline.png": (saved(plain(), "PNG"), RED),
        "escape \x1b[2J.png": (saved(plain(), "PNG"), RED),
        os.fsdecode(b"not \xff utf-8.png"): (saved(plain(), "PNG"), RED),
        "x" * 250 + ".png": (saved(plain(), "PNG"), RED),
        "text of a megabyte.png": (saved(plain(), "PNG", pnginfo=text), RED),
        "bytes after the end.png": (saved(plain(), "PNG") + bytes(1000), RED),
        "bytes after the end.jpg": (saved(plain(), "JPEG", quality=100) + b"PK\x03\x04", RED),
        # refused
        "empty.jpg": (b"", None),
        "empty.png": (b"", None),
        "text.jpg": (b"not an image\n", None),
        "html.png": (b"<html>403</html>", None),
        "a pickle.png": (b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.", None),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", None),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
        "pdf.png": (b"%PDF-1.4\n", None),
        "cut at half.jpg": (jpeg[: len(jpeg) // 2], None),
        "cut at half.png": (whole[: len(whole) // 2], None),
        "cut in its header.png": (whole[:20], None),
        "cut at half.gif": (saved(noisy(), "GIF")[:-60], None),
        "cut at half.webp": (saved(noisy(), "WEBP", lossless=True)[:100], None),
        "cut at half.tif": (saved(noisy(), "TIFF")[:100], None),
        "cut at half.bmp": (saved(noisy(), "BMP")[:100], None),
        "cut at half.ppm": (saved(noisy(), "PPM")[:100], None),
        "wrong checksum.png": (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], None),
        "bomb of 10^10 pixels.png": (png(100_000, 100_000, b""), None),
        "bomb of 10^8 pixels.png": (png(10_000, 10_000, bytes(10**6)), None),
        "just over the cap.png": (png(8_000, 8_001, b""), None),
        "bomb.jpg": (bomb, None),
        "bomb.gif": (b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\x00\x02\x02D\x01\x00;", None),
        "bomb.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0), None),  # noqa: E501
        "bomb.ppm": (b"P6 999999 999999 255\n", None),
        "text that unpacks to 1 GB.png": (png(8, 8, bytes(25 * 8), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), None),  # noqa: E501
        "profile that unpacks to 100 MB.png": (png(8, 8, bytes(25 * 8), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))), None),  # noqa: E501
        "no pixels.png": (png(0, 0, b""), None),
        "zero high.ppm": (b"P6 8 0 255\n", None),
        "32 bits.tif": (saved(plain("I", 70000), "TIFF"), None),
        "float.tif": (saved(plain("F", 0.5), "TIFF"), None),
        "unknown compression.tif": (saved(plain(), "TIFF").replace(struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 9999)), None),  # noqa: E501
        "offsets in a circle.tif": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", None),
        **{f"lossy {form}.{form}": (saved(plain(), form.upper(), quality=100), lossy) for form in ("webp",)},
    }  # fmt: skip


def near(found: torch.Tensor, expected: tuple[float, ...], name: str) -> str | None:
    """What is wrong with the (C, H, W) mean colour: lossy formats may be off by some grey levels."""
    means = found.double().mean((1, 2)).tolist()
    if len(means) == 3 and len(expected) == 1:
        expected = expected * 3
    slack = 9.0 if Path(name).suffix.lower() in {".jpg", ".webp"} or "jpeg" in name else 0.6
    if len(means) != len(expected) or any(abs(a - b) > slack for a, b in zip(means, expected, strict=True)):
        return f"decoded to {[round(mean) for mean in means]}, not {list(expected)}"
    return None


def odd_entries(folder: Path) -> dict[str, Callable[[Path], None]]:
    """What may lie in a folder beside files; each is made at a path of its name."""
    return {
        "a folder named.jpg": lambda path: path.mkdir(),
        "a pipe.jpg": os.mkfifo,
        "a link to itself.jpg": lambda path: path.symlink_to(path),
        "a link to nothing.jpg": lambda path: path.symlink_to(folder / "gone.jpg"),
        "a link to a device.jpg": lambda path: path.symlink_to("/dev/zero"),
        "a link to a loop of folders": lambda path: path.symlink_to(path.parent),
    }


def packed(x: Any) -> bytes:
    """A torch file of an array ``x``; torch warns of odd kinds."""
    with warnings.catch_warnings(action="ignore"):
        return whole({"x": x})


def bomb_of_zeros() -> bytes:
    """An .npz of a megabyte that would unpack to 1.2 GB."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as x,
    ):
        shape = (1_200, 10**6)
        x.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118))
        x.write(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n")
        for _ in range(shape[0]):
            x.write(bytes(shape[1]))
    return buffer.getvalue()


def arrays(folder: Path) -> dict[str, Path]:
    """Array files that are no data."""
    x = np.zeros((5, 1, SIZE, SIZE), dtype=np.uint8)
    y = np.zeros(5, dtype=np.int64)
    floats = np.zeros((5, 1, SIZE, SIZE), dtype=np.float32)
    poisoned, infinite = floats.copy(), floats.copy()
    poisoned[2, 0, 3, 3], infinite[0] = np.nan, np.inf
    named: dict[str, dict[str, Any]] = {
        "object.npz": {"x": np.array([os.system], dtype=object)},
        "text.npz": {"x": np.array([["a", "b"]])},
        "records.npz": {"x": np.zeros(5, dtype=[("a", "f4")])},
        "dates.npz": {"x": np.zeros((5, 2), dtype="M8[s]")},
        "complex.npz": {"x": floats.astype(np.complex64)},
        "nan.npz": {"x": poisoned},
        "inf.npz": {"x": infinite},
        "no x.npz": {"images": x},
        "nothing.npz": {},
        "empty x.npz": {"x": x[:0]},
        "scalar.npz": {"x": np.array(3)},
        "vector.npz": {"x": np.zeros(5)},
        "channels last.npz": {"x": np.zeros((5, 32, 32, 3), dtype=np.uint8)},
        "labels too few.npz": {"x": x, "y": y[:3]},
        "labels negative.npz": {"x": x, "y": y - 1},
        "labels with fractions.npz": {"x": x, "y": y + 0.5},
        "labels beyond the classes.npz": {"x": x, "y": y + 10},
        "another shape.npz": {"x": np.zeros((5, 3, 9, 9), dtype=np.uint8)},
    }
    paths = {}
    for name, content in named.items():
        paths[name] = folder / name
        np.savez(paths[name], **content)
    np.savez(folder / "whole.npz", x=x)
    bare = (folder / "whole.npz").read_bytes()
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    lying = (
        head
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1, 8, 8), }".ljust(117)
        + b"\n"
    )
    raw = {
        "cut.npz": bare[: len(bare) // 2],
        "empty.npz": b"",
        "text of a file.npz": b"hello",
        "a pickle.npy": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.",
        "header that lies.npy": lying,
        "header that runs.npy": head + b"__import__('os').system('id')".ljust(117) + b"\n",
        "cut.npy": bare[60:90],
        "code.pt": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.",
        "no data.csv": b"a,b\n1,2\n",
        "bytearray of 1 GiB.pt": with_pickle(GIB),
        "nested.pt": packed(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        "sparse.pt": packed(torch.ones(5, 2).to_sparse()),
        "expanded.pt": packed(torch.ones(1, 1).expand(10**9, 9)),
        "NaN behind an attribute.pt": packed(Disguised(torch.full((5, 2), torch.nan), detach=torch.Size)),
        "labels of a sparse kind.pt": whole({"x": torch.ones(5, 2), "y": torch.ones(5).long().to_sparse()}),
        "packed thousandfold.npz": bomb_of_zeros(),
    }
    for name, content in raw.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    return paths


def mutated(first: int, count: int, folder: Path, store: Path) -> None:
    """Decode seeded mutations of images of every format; write how each ended."""
    whole = {form: saved(noisy(), form) for form in images.FORMATS}
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # as cli.main
    with store.open("w") as log:
        for seed in range(first, first + count):
            draw = random.Random(seed)
            form = draw.choice(images.FORMATS)
            data = bytearray(whole[form])
            for _ in range(draw.choice([1, 1, 2, 8])):
                at = draw.randrange(draw.choice([len(data), min(len(data), 64)]))
                data[at] = draw.randrange(256)
            if draw.random() < 0.1:
                del data[draw.randrange(len(data)) :]
            path = folder / f"mutated-{seed}.png"
            path.write_bytes(data)
            try:
                with warnings.catch_warnings(action="ignore"):  # as images.ImageFiles.in_memory
                    images.decode(path, images.ImageReading(image_size=8))
                ended = "decoded"
            except DataError as error:
                ended = "refused" if str(path) in str(error) else f"refused as {error}"
            except Exception as error:  # noqa: BLE001  that is the finding
                ended = f"{form}: {type(error).__name__}: {str(error)[:150]}"
            path.unlink()
            log.write(json.dumps([seed, ended]) + "\n")
            log.flush()


def streamed() -> None:
    images.IN_MEMORY = 0


def run(small: bool) -> tuple[list[Row], list[str]]:
    good = Row("odd images: decoded to the right colour, in memory and streamed")
    bad = Row("broken images and bombs: exit 4, one line with the file, memory < 64 MiB above")
    entries = Row(
        "what is no file among images: exit 4 with its path (folders and loops of links: passed over)"
    )
    array_row = Row("array files that are no data: exit 4 (2 for another suffix), one line with the file")
    skip = Row("--skip-bad: exit 0, the files left out counted and listed in the result and on stderr")
    fuzz = Row(
        "seeded mutations of images of seven formats: decoded or refused with the path; no crash or hang"
    )
    notes: list[str] = []
    every = 9 if small else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm(folder)
        command = ["--no-normalize", "--measures", "mean_entropy", "-q", "--json", "--image-size", SIZE]
        model = folder / "warm"

        def measured(data: Path, *more: object, before: Callable[[], Any] | None = None) -> Any:
            options = [*command, *more]
            return gmprobe(
                "measure", model, "--unlabeled", data, "--channels", 1, *options, before=before, within=60
            )

        cases = list(files().items())
        lone = folder / "lone"
        base = 0
        for case, (content, expected) in cases[::every] if small else cases:
            lone.mkdir()
            path = lone / case
            path.write_bytes(content)
            if expected is not None:
                try:
                    problem = near(open_source(str(lone), labeled=False).pool.x[:1][0], expected, case)
                except DataError as error:
                    problem = f"refused: {error}"
                outs = set()
                for before in (None, streamed):
                    ran = measured(lone, before=before)
                    if ran.code != 0 or ran.err:
                        problem = problem or f"exit {ran.code}: {ran.err}"
                    outs.add(ran.out)
                    base = max(base, ran.peak)
                good.add(repr(case)[:80], problem or (None if len(outs) == 1 else "streamed, it differs"))
            else:
                ran = measured(lone)
                problem = one_line(ran, 4, path)
                if problem is None and ran.peak - base > 64 * 2**20:
                    problem = f"took {(ran.peak - base) / 1e6:.0f} MB"
                bad.add(case, problem)
            path.unlink()
            lone.rmdir()
        for case, make in odd_entries(folder).items():
            lone.mkdir()
            (lone / "0.png").write_bytes(saved(noisy(), "PNG"))
            path = lone / case
            make(path)
            ran = measured(lone)
            passed_over = case in {"a folder named.jpg", "a link to a loop of folders"}
            problem = one_line(ran, 4, path) if not passed_over else None if ran.code == 0 else ran.err
            entries.add(case, problem)
            _remove(lone)
        entries.add(*_unreadable(folder, measured))
        below = folder / "arrays"
        below.mkdir()
        for case, path in arrays(below).items():
            kind = "--labeled" if case.startswith("labels") else "--unlabeled"
            names = "error" if case.startswith("labels") else "mean_entropy"
            ran = gmprobe("measure", model, kind, path, "--measures", names, "-q", within=60)
            array_row.add(case, one_line(ran, 2 if path.suffix == ".csv" else 4, path))
        skip.add("measure", _skipped_in_measure(folder, measured))
        skip.add("train", _skipped_in_train(folder))
        skip.add("measure of that run", _skipped_in_own_part(folder))
        skip.add("all are bad", _all_bad(folder, measured))
        seed, total = 0, 200 if small else COUNT
        while seed < total:
            store = folder / "log"
            ran = fork(
                lambda seed=seed, store=store: mutated(seed, min(BATCH, total - seed), folder, store), 120
            )
            ended = [json.loads(line) for line in store.read_text().splitlines()]
            for number, how in ended:
                fuzz.add(f"seed {number}", None if how in {"decoded", "refused"} else how)
            seed += len(ended)
            if ran.err.strip():
                notes.append(f"mutated images up to seed {seed}: on stderr {ran.err.strip()[:150]!r}")
            if len(ended) < min(BATCH, total - (seed - len(ended))):
                fuzz.add(f"seed {seed}", "hung" if ran.code is None else f"exit {ran.code}")
                seed += 1
        rows = [good, bad, entries, array_row, skip, fuzz]
        rows.append(_listing(folder, measured, 2_000 if small else 1_000_000, notes))
    return rows, notes


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def _unreadable(folder: Path, measured: Callable[..., Any]) -> tuple[str, str | None]:
    """A file that may not be read: root reads all, so the process that tries is nobody's."""
    lone = folder / "lone"
    lone.mkdir()
    path = lone / "private.png"
    path.write_bytes(saved(noisy(), "PNG"))
    path.chmod(0)

    def attempt() -> None:
        folder.chmod(0o755)
        os.setuid(65534)
        try:
            open_source(str(lone), labeled=False)
        except DataError as error:
            raise SystemExit(0 if str(path) in str(error) and "ermission" in str(error) else 5) from None

    ran = fork(attempt) if os.getuid() == 0 else measured(lone)
    _remove(lone)
    return "a file without permission", None if ran.code == (
        0 if os.getuid() == 0 else 4
    ) else f"{ran.code} {ran.err}"


def _mixed(folder: Path) -> Path:
    """A labeled folder of 40 images of two classes; six more are broken."""
    data = folder / "mixed"
    if data.exists():
        return data
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (data / label).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{index}.png")
        (data / label / "empty.png").touch()
        (data / label / "text.jpg").write_text("no image")
        (data / label / "bomb.png").write_bytes(png(100_000, 100_000, b""))
    return data


def _skipped_in_measure(folder: Path, measured: Callable[..., Any]) -> str | None:
    data = _mixed(folder)
    ran = gmprobe(
        "measure",
        folder / "warm",
        "--unlabeled",
        data,
        "--skip-bad",
        "--no-normalize",
        "--measures",
        "mean_entropy",
        "--json",
    )
    if ran.code != 0:
        return f"exit {ran.code}: {ran.err}"
    result = json.loads(ran.out)[0]
    if result["num_examples"] != 40 or len(result["skipped"]) != 6:
        return f"{result['num_examples']} examples, {len(result['skipped'])} left out"
    if "6 file(s) left out" not in ran.err:
        return f"stderr says {ran.err}"
    return one_line(measured(data), 4, data)


def _skipped_in_train(folder: Path) -> str | None:
    data, out = _mixed(folder), folder / "skipping"
    ran = gmprobe("train", "--data", data, "--model", "mlp-8", "--epochs", 1, "--out", out, "--skip-bad")
    if ran.code != 0 or "6 file(s) left out" not in ran.err:
        return f"exit {ran.code}: {ran.err}"
    listed = json.loads((out / "split.json").read_text())["skipped"]
    return None if len(listed) == 6 else f"split.json lists {len(listed)}"


def _skipped_in_own_part(folder: Path) -> str | None:
    ran = gmprobe("measure", folder / "skipping", "--measures", "mean_entropy", "--json", "-q")
    if ran.code != 0:
        return f"exit {ran.code}: {ran.err}"
    found = len(json.loads(ran.out)[0]["skipped"])
    return None if found == 6 else f"lists {found}"


def _all_bad(folder: Path, measured: Callable[..., Any]) -> str | None:
    lone = folder / "lone"
    lone.mkdir()
    (lone / "0.png").touch()
    problem = one_line(measured(lone, "--skip-bad"), 4, lone)
    _remove(lone)
    return problem


def _listing(folder: Path, measured: Callable[..., Any], count: int, notes: list[str]) -> Row:
    """A folder of so many entries, three of them images; and one of so many that are named as images and are empty."""
    row = Row(
        f"a folder of {count:,} entries: the three images in it measured; empty images by the million: exit 4"
    )
    many = folder / "many"
    many.mkdir()
    for suffix, problem_of in ((".txt", None), (".png", 4)):
        first = many / f"x{suffix}"
        first.touch()
        for index in range(count):
            if index % 50_000 == 0:  # a file system allows only so many links to one file
                first = many / f"x{index}{suffix}"
                first.touch()
            else:
                os.link(first, many / f"x{index}{suffix}")
        if problem_of is None:
            for index in range(3):
                (many / f"{index}.png").write_bytes(saved(noisy(), "PNG"))
        began = time.perf_counter()
        ran = gmprobe("measure", folder / "warm", "--unlabeled", many, "--no-normalize", "--measures", "mean_entropy", "--json",  # noqa: E501
                      "--channels", 1, "-q", within=300)  # fmt: skip
        seconds = time.perf_counter() - began
        if problem_of is None:
            found = json.loads(ran.out)[0]["num_examples"] if ran.code == 0 else ran.err
            row.add("other names", None if found == 3 else str(found))
        else:
            row.add("names of images", one_line(ran, problem_of, many))
        notes.append(
            f"{count:,} entries named x….{suffix[1:]}: {seconds:.1f} s, peak {ran.peak / 1e6:.0f} MB"
        )
        for path in os.scandir(many):
            os.unlink(path)  # noqa: PTH108  a million of them
    return row

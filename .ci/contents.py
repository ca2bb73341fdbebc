"""Check what is in the wheel and the sdist of a folder: `python .ci/contents.py DIST`. Exits 1 with what is wrong."""

import sys
import tarfile
import zipfile
from pathlib import Path

root = Path(__file__).parents[1]
here = {path.relative_to(root).as_posix() for path in (root / "gm_probe").rglob("*") if path.is_file()}
code = {name for name in here if "__pycache__" not in name}
for needed in ("gm_probe/py.typed", "gm_probe/recipes/quickstart.toml", "gm_probe/recipes/paper/fig6.toml"):
    assert needed in code, f"{needed} has gone from the code"
assert any(name.startswith("gm_probe/analysis/page/") and name.endswith(".j2") for name in code)

[wheel], [sdist] = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
with zipfile.ZipFile(wheel) as archive:
    built = {name for name in archive.namelist() if ".dist-info/" not in name}
with tarfile.open(sdist) as packed:
    source = {name.partition("/")[2] for name in packed.getnames()}
beside = {
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "LICENSE",
    "pyproject.toml",
    "tests/conftest.py",
}
beside |= {path.relative_to(root).as_posix() for path in (root / "docs").glob("*.md")}
wrong = [f"not in the wheel: {name}" for name in sorted(code - built)]
wrong += [f"in the wheel, but no part of the package: {name}" for name in sorted(built - code)]
wrong += [f"not in the sdist: {name}" for name in sorted((code | beside) - source)]
print(f"{wheel.name}: {len(built)} files; {sdist.name}: {len(source)} files")
sys.exit("\n".join(wrong) or 0)

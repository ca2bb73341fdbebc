"""On real input: CIFAR-10 JPEGs and a public ResNet-20, both outside the repository."""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gm_probe.cli import main

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GM_PROBE_SHARED", ROOT.parent / "shared"))
ARCHIVE = SHARED / "data" / "cifar10-images.tar.gz"
CHECKPOINT = SHARED / "data" / "checkpoints" / "resnet20-12fca82f.th"

pytestmark = pytest.mark.skipif(
    not (ARCHIVE.exists() and CHECKPOINT.exists()),
    reason=f"no CIFAR-10 JPEGs and public checkpoints in {SHARED} (set GM_PROBE_SHARED)",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 test photographs of each class, in class folders."""
    folder = tmp_path_factory.mktemp("cifar10")
    taken: Counter[str] = Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:  # test/CLASS/NUMBER.jpg
            part, *rest = Path(member.name).parts
            if part == "test" and len(rest) == 2 and taken[rest[0]] < 10:
                archive.extract(member, folder, filter="data")
                taken[rest[0]] += 1
            if sum(taken.values()) == 100:
                break
    assert len(taken) == 10
    return folder / "test"


def measured(capsys: pytest.CaptureFixture[str], data: str, folder: Path, options: str) -> dict[str, Any]:
    model = f"{ROOT / 'benchmarks' / 'cifar_resnet.py'}:resnet20"
    options += " --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --json"
    main(["measure", str(CHECKPOINT), "--model", model, data, str(folder), *options.split()])
    [result] = json.loads(capsys.readouterr().out)
    assert result["num_parameters"] == 269_722  # the published size
    return result["measures"]


def test_public_resnet20_is_measured_on_unlabeled_jpegs(photographs, capsys):
    names = ["local_inconsistency", "fisher_lambda_max", "hessian_lambda_max"]
    options = f"--measures {','.join(names)} --starts 2 --eigen-tolerance 0.2 --max-examples 12"
    rows = measured(capsys, "--unlabeled", photographs, options)
    assert list(rows) == names  # no error: labels were not read
    assert rows["hessian_lambda_max"]["labels"] == "predicted"
    assert all(row["value"] > 0 and row["converged"] for row in rows.values())
    assert rows["local_inconsistency"]["value"] < 10


def test_public_resnet20_classifies_jpegs(photographs, capsys):
    rows = measured(capsys, "--labeled", photographs, "--measures error,cross_entropy")
    # 92.6 % on the originals; JPEG costs it about ten points. 100 images: a standard error of 4 points
    assert 0.05 < rows["error"]["value"] < 0.35
    assert 0 < rows["cross_entropy"]["value"] < 2

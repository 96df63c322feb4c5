"""What `make test-kernels` looks at under other kernels, under this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import traffic
from tests.kernels.packages import SERIES, PackagesError, _newest


@pytest.mark.kernel
def test_everything_holds_under_this_kernel(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.kernels.dataplane", traffic.build(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    looks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"look"')]
    assert [look for look in looks if not look["holds"]] == []
    assert len(looks) > 10
    assert done.returncode == 0, done.stderr


def test_of_a_suites_kernels_the_newest_is_taken() -> None:
    names = ["6.9.1+deb13-cloud-amd64", "6.18.4+deb13-cloud-amd64", "6.18.12+deb13-cloud-amd64", "7.0-amd64"]
    newest = next(series for series in SERIES if series.name == "newest")
    assert _newest([f"linux-image-{name}" for name in names], newest) == "6.18.12+deb13-cloud-amd64"
    with pytest.raises(PackagesError, match=r"bullseye-security has no kernel 5\.10"):
        _newest(["linux-image-6.1.0-9-cloud-amd64"], SERIES[0])

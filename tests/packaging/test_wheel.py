"""The wheel by itself: built, put into an empty environment, and run from somewhere else.

Only p2pnet comes from the wheel. What it depends on is borrowed from the
environment of the tests, so that nothing has to be downloaded again.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "bootstrap_peers.txt",
    "proto", "p2pnet",
)  # fmt: skip
RUN_S = 120.0  # a deadline that only a bug meets


def environment(home: Path) -> dict[str, str]:
    """Nothing of the checkout is on the path, and nothing of the user's p2pnet is seen."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("P2PNET_") and key != "PYTHONPATH"
    }
    return {**kept, "HOME": str(home)}


def run(home: Path, *command: str | Path) -> str:
    """What a command, run from `home`, writes on stdout; fails with all that it said."""
    done = subprocess.run(
        command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=RUN_S
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somewhere else than the checkout."""
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(home: Path) -> Path:
    """Built from a copy as a fresh clone is: without what is generated."""
    source = home / "source"
    source.mkdir()
    generated = shutil.ignore_patterns("__pycache__", "*_pb2*.py*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=generated)
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "p2pnet" / "bootstrap_peers.txt").unlink(missing_ok=True)
    run(home, sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", home, source)
    (built,) = home.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(home: Path, wheel: Path) -> Path:
    """The directory of the commands of an environment that has p2pnet from the wheel alone."""
    place = home / "venv"
    venv.create(place, with_pip=False)
    binaries = place / "bin"
    quietly = ("--quiet", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python", "install", *quietly)
    run(home, *pip, "--no-deps", "--no-index", wheel)
    # A directory that a .pth file names is searched last, and its own .pth files (an
    # editable p2pnet among them) are not read.
    packages = place / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


def test_the_wheel_holds_all_that_runs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "p2pnet/v1/vnode_pb2.py",
        "p2pnet/v1/vnode_pb2_grpc.py",
        "p2pnet/bootstrap_peers.txt",
        "p2pnet/py.typed",
    ):
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert all(top == "p2pnet" or top.startswith("p2pnet-") for top in tops), tops


def test_join_and_members_from_the_wheel(home: Path, installed: Path) -> None:
    where = run(home, installed / "python", "-c", "import p2pnet; print(p2pnet.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)

    command = installed / "p2pnet"
    node = subprocess.Popen(
        [command, "join", "--listen", "/ip4/127.0.0.1/tcp/0", "--until-eof", "--json"],
        env=environment(home), cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with node:
        try:
            assert node.stdout is not None
            assert select.select([node.stdout], [], [], RUN_S)[0], "the node said nothing"
            ready = json.loads(node.stdout.readline())
            assert ready["event"] == "ready"
            assert ready["data_dir"] == str(home / ".p2pnet")
            members = json.loads(run(home, command, "members", "--json"))
            assert [row["peer_id"] for row in members] == [ready["peer_id"]]
            left, _ = node.communicate(timeout=RUN_S)  # its stdin ends
            assert json.loads(left) == {"event": "left"}
            assert node.returncode == 0
        finally:
            if node.poll() is None:
                node.kill()

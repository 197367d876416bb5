"""Builds the protobuf code; everything else about the package is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def generate() -> None:
    """Writes `p2pnet/v1/*_pb2*.py[i]` from `proto/`. They are built, never edited or committed.

    Also puts the bootstrap list, which people edit at the top of the repo, where it is packaged.
    """
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted((ROOT / "proto").rglob("*.proto"))
    package = ROOT / "p2pnet" / "v1"
    package.mkdir(exist_ok=True)
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        ["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", f"--python_out={ROOT}",
         f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}", *map(str, sources)]
    )  # fmt: skip
    if code != 0:
        sys.exit(f"protoc failed with exit code {code}: see its messages above")
    shutil.copyfile(ROOT / "bootstrap_peers.txt", ROOT / "p2pnet" / "bootstrap_peers.txt")
    (package / "__init__.py").write_text('"""The protocol p2pnet.v1, generated from proto/."""\n')


generate()
setup(packages=find_packages(include=["p2pnet", "p2pnet.*"]))

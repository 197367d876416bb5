"""The example that trains a language model on real English and samples from it, in short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "char_transformer.py"
LIMIT_S = 240.0


def test_the_transformer_learns_and_writes() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "40", "--tokens", "70", "--prompt", "Ab ovo "],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([0-9.]+)", done.stdout, re.M)]
    assert len(losses) == 40
    assert 5 < losses[0] < 7, "about log 256: it knows nothing"
    assert losses[-1] < 3.3, "the letters' frequencies, at least"
    bits = re.search(r"not seen: ([0-9.]+) bits a character", done.stdout)
    assert bits is not None
    assert float(bits[1]) < 4.8
    # The context is 64 bytes: the text is longer, so that it begins anew once.
    written = re.search(r"^Ab ovo (.*?)\n\n[0-9]+ characters a second", done.stdout, re.M | re.S)
    assert written is not None
    assert 35 <= len(written[1]) <= 70

#!/bin/sh
# Says what is missing before pip says it in two hundred lines.
# fastecdsa, which libp2p needs, is built from source: a C compiler, Python's and libgmp's headers.
set -u
python=${PYTHON:-python3.11}
missing=""
if ! command -v "$python" >/dev/null 2>&1; then
  echo "p2pnet needs Python 3.11 and '$python' is not there." \
       "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv), or say where it is: make PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  echo "p2pnet needs Python 3.11, and '$python' is $("$python" --version 2>&1). Say where 3.11 is: make PYTHON=/path/to/python3.11" >&2
  exit 1
fi
compiler=${CC:-}
[ -n "$compiler" ] || for c in cc gcc clang; do
  if command -v "$c" >/dev/null 2>&1; then compiler=$c; break; fi
done
if [ -z "$compiler" ]; then
  missing="a C compiler (package gcc)"
else
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  printf '#include <gmp.h>\n' | "$compiler" -E - >/dev/null 2>&1 || missing="${missing:+$missing, }libgmp's headers (package libgmp-dev)"
  [ -f "$include/Python.h" ] || missing="${missing:+$missing, }Python's headers (package python3.11-dev)"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing="${missing:+$missing, }Python's venv (package python3.11-venv)"
if [ -n "$missing" ]; then
  echo "p2pnet cannot be set up yet. Missing: $missing. Install that and run make again." >&2
  exit 1
fi

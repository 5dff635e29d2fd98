#!/usr/bin/env bash
# Regenerates every table and figure: ./run_all.sh --help. All it does is find a Python; difflt_core/bootstrap.py does the rest.
set -euo pipefail
export DIFFLT_FROM=$PWD  # what relative paths of the command line are relative to
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
for python in python python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then
        PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m difflt_core.bootstrap "$@"
    fi
done
echo "run_all.sh: needs Python 3.11 to 3.14, found $(python3 --version 2>&1 || echo none)." \
    "Install it (https://www.python.org, conda or your system's packages) and run this again." >&2
exit 1

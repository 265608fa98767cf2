#!/bin/sh
# Installs edge into .venv here: ./setup.sh [--extras serve] [--cuda] [--no-build]. PYTHON names another Python.
cd "$(dirname "$0")" || exit 1
for python in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" -m edge.setup "$@"
    fi
done
echo "error: no environment could be made: it needs Python 3.11 or newer with its venv module" >&2
echo "  Debian, Ubuntu: sudo apt-get install python3 python3-venv; or name one: PYTHON=/path/to/python ./setup.sh" >&2
exit 1

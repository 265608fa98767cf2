"""edge: serve a small language model, artefact in, HTTP out. Nothing here imports torch."""

__version__ = "0.1.0"

import sys

# Here, in words that Python 2 reads: an older one cannot read the other files.
if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit(
        "error: this Python is %d.%d, edge needs 3.11 or newer\n"  # noqa: UP031
        "  Debian, Ubuntu: sudo apt-get install python3 python3-venv; macOS: brew install python@3.13; "
        "Windows: winget install Python.Python.3.13" % sys.version_info[:2]
    )

"""The chat page's libraries, fetched anew with npm: `python -m tests.support.web_libraries`.

To renew one, write its version into libraries.json: a file that differs from its SHA-256 there is named with
the hash that it has, for whoever has looked at what changed to write in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "edge" / "server" / "api" / "web" / "libraries"
TABLE = "libraries.json"


def table() -> list[dict[str, Any]]:
    """Each library: package, version, license, and files as {name here: [name in the package, SHA-256]}."""
    rows: list[dict[str, Any]] = json.loads((FOLDER / TABLE).read_text(encoding="utf-8"))
    return rows


def renew(row: dict[str, Any], npm: str) -> list[str]:
    """Write a library's files; where one is not as the table has it, say which, and write none."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "--silent", f"{row['package']}@{row['version']}"], cwd=folder, check=True
        )
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            contents = {
                name: package.extractfile(f"package/{inner}") for name, (inner, _) in row["files"].items()
            }
            found = {name: file.read() for name, file in contents.items() if file is not None}
    wrong = [
        f"{name} of {row['package']} {row['version']} has the SHA-256 {digest}, not {expected}"
        for name, (_, expected) in row["files"].items()
        if (digest := hashlib.sha256(found[name]).hexdigest()) != expected
    ]
    for name, content in {} if wrong else found.items():
        (FOLDER / name).write_bytes(content)
    return wrong


def main() -> None:
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is needed, and not installed")
    wrong = [line for row in table() for line in renew(row, npm)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

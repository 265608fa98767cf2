"""schemathesis on our own OpenAPI document: no 5xx, and no answer that it does not describe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conformance.conftest import ADMIN

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def check(folder: Path, url: str, examples: int, *options: str) -> None:
    command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(examples), "--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--request-timeout", "60", "--warnings", "off", "--no-color", *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900, cwd=folder)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_the_document_holds(tmp_path: Path, url: str) -> None:
    check(tmp_path, url, 40, "--exclude-path-regex", "^/admin/")


def test_it_holds_for_who_may_change_the_server(tmp_path: Path, url: str) -> None:
    check(tmp_path, url, 5, "--include-path-regex", "^/admin/", "--header", f"x-api-key: {ADMIN}")

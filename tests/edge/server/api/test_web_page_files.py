"""The chat page's files: how they are served, what they may hold, and whose they are."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.server.api import web_page
from edge.ui import texts
from tests.support import web_libraries

ROOT = Path(__file__).parents[4]
WEB = ROOT / "edge" / "server" / "api" / "web"
OURS = {path.name: path.read_text(encoding="utf-8") for path in sorted(WEB.glob("*.*"))}
SCRIPTS = {name: text for name, text in OURS.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    app.include_router(web_page.router)
    with TestClient(app) as started:
        yield started


def test_nothing_runs_but_the_pages_own_files(client: Any) -> None:
    for path in ("/", "/web/page.js"):
        response = client.get(path)
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src data:"} <= set(policy)
        assert {"require-trusted-types-for 'script'", "trusted-types 'none'"} <= set(policy)
        assert "unsafe" not in str(policy) and "http" not in str(policy)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-dns-prefetch-control"] == "off"
    html = OURS["page.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", html)
    for name, text in OURS.items():
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|DOMParser|document\.write|\beval\b", text
        ), name


def test_each_file_has_its_type_and_is_read_once(client: Any) -> None:
    kinds = {"page.js": "text/javascript", "page.css": "text/css", "libraries/marked.LICENSE": "text/plain"}
    for name, kind in kinds.items():
        response = client.get(f"/web/{name}")
        assert response.content == (WEB / name).read_bytes()
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        tag = response.headers["etag"]
        again = client.get(f"/web/{name}", headers={"if-none-match": f'"other", W/{tag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(f"/web/{name}", headers={"if-none-match": '"other"'}).status_code == 200
    for path in ("/web/", "/web/libraries", "/web/..%2fweb_page.py", "/web/%2fetc%2fpasswd", "/web/page.js/"):
        assert client.get(path).status_code == 404, path


def test_all_that_the_page_loads_is_there() -> None:
    for name, text in SCRIPTS.items():
        for other in re.findall(r'(?:from|import) "\./([^"]+)"', text):
            assert (WEB / other).is_file(), f"{name}: {other}"
    for other in re.findall(r'(?:href|src)="(web/[^"]+)"', OURS["page.html"]):
        assert (WEB.parent / other).is_file()


def test_every_text_is_there_in_chinese_and_as_edge_ui_says_it() -> None:
    table = re.search(r"const CHINESE = \{\n(.*?)\n\};", OURS["texts.js"], re.DOTALL)
    assert table is not None
    chinese = dict(re.findall(r'"([^"]+)":\s+"([^"]+)",', table[1]))
    used = set(re.findall(r'data-(?:text|label|placeholder)="([^"]+)"', OURS["page.html"]))
    for name in ("page.js", "markdown.js", "server.js"):
        used |= set(re.findall(r'\bt\("([^"]+)"', OURS[name]))
    used |= set(re.findall(r't\([^()]*\? "([^"]+)" : "([^"]+)"\)', OURS["page.js"])[0])
    assert used == set(chinese)
    for english, text in chinese.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", text))
        assert texts.CHINESE.get(english, text) == text


def test_each_library_is_as_its_table_says_and_has_its_license() -> None:
    rows = web_libraries.table()
    files = {name: digest for row in rows for name, (_, digest) in row["files"].items()}
    present = {path.name: path for path in web_libraries.FOLDER.iterdir()}
    assert set(present) == {*files, web_libraries.TABLE}
    for name, digest in files.items():
        assert hashlib.sha256(present[name].read_bytes()).hexdigest() == digest, name
    for row in rows:
        [script] = [name for name in row["files"] if name.endswith(".js")]
        assert script.replace(".js", ".LICENSE") in row["files"]
        assert row["version"] in present[script].read_text(encoding="utf-8")[:1000]
    assert sum(path.stat().st_size for name, path in present.items() if name.endswith(".js")) < 250_000


def test_the_package_carries_them_with_their_licenses() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["edge.server.api"]
    carried = {path for pattern in patterns for path in WEB.parent.glob(pattern)}
    assert {path for path in WEB.rglob("*") if path.is_file()} <= carried
    licenses = {path for pattern in project["project"]["license-files"] for path in ROOT.glob(pattern)}
    assert licenses == {ROOT / "LICENSE", *WEB.rglob("*.LICENSE")}
    stated = set(project["project"]["license"].split(" AND "))
    assert stated == {"Apache-2.0", *(row["license"] for row in web_libraries.table())}


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_a_library_of_another_content_is_named_and_not_written(
    digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(command: list[str], *, cwd: str, check: bool) -> None:
        assert command == ["npm", "pack", "--silent", "one@1.0"] and check
        with tarfile.open(Path(cwd) / "one-1.0.tgz", "w:gz") as package:
            entry = tarfile.TarInfo("package/dist/one.js")
            entry.size = 4
            package.addfile(entry, io.BytesIO(b"1;\r\n"))

    monkeypatch.setattr(subprocess, "run", pack)
    monkeypatch.setattr(web_libraries, "FOLDER", tmp_path)
    true = hashlib.sha256(b"1;\r\n").hexdigest()
    row = {"package": "one", "version": "1.0", "files": {"one.js": ["dist/one.js", digest or true]}}
    wrong = web_libraries.renew(row, "npm")
    if digest:
        assert wrong == [f"one.js of one 1.0 has the SHA-256 {true}, not {digest}"]
        assert not list(tmp_path.iterdir())
    else:
        assert wrong == []
        assert (tmp_path / "one.js").read_bytes() == b"1;\r\n"

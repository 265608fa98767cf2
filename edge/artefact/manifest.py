"""`edge.json`, the manifest of every folder that a stage writes: contents, digests, and where it came from.

A stage writes into a sibling folder and renames it into place, so that a killed export never leaves a
half-written folder, or an old shard, under the final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from edge import __version__
from edge.artefact import json_file, windows_names
from edge.errors import ExistsError, InputError

FILE = "edge.json"
SCHEMA = 1


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class FileEntry(TypedDict, total=False):
    """A file of the folder: bytes, and sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """What a folder holds and where it came from.

    stage: model, checkpoint, adapter, merged, gguf, lora or onnx. name: what people call it.
    parents: `{"stage", "path", "digest"}` of each input.
    digest: over the names and contents of `files`. base_model: where the weights began.
    settings: of this stage. chat_template: sha256 of the template's UTF-8 text, None without one.
    stop_ids: the union of what tokenizer, generation config and template end a turn with.
    thinking: None (the model does not think), "on", "off" or "mixed". verify: the equivalence report.
    """

    stage: str
    name: str
    base_model: str = ""
    parents: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    stop_ids: list[TokenId] = field(default_factory=list)
    thinking: str | None = None
    verify: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    digest: str = ""
    created: str = ""
    schema: int = SCHEMA

    def parent(self, path: Path) -> dict[str, str]:
        """This manifest as an entry for a child's `parents`; `path`: its folder."""
        return {"stage": self.stage, "path": str(path), "digest": self.digest}

    def child(self, stage: str, path: Path, *, settings: dict[str, Any], packages: Iterable[str]) -> Manifest:
        """The manifest of the same model in another form, made from this manifest's folder at `path`.

        packages: those that made it, whose versions are noted.
        """
        return Manifest(
            stage=stage,
            name=self.name,
            base_model=self.base_model,
            parents=[self.parent(path.absolute()), *self.parents],
            settings=settings,
            chat_template=self.chat_template,
            stop_ids=list(self.stop_ids),
            thinking=self.thinking,
            versions=versions(*packages),
        )


def text_digest(text: str | None) -> str | None:
    """sha256 of `text` as UTF-8, hexadecimal; None for None."""
    return None if text is None else hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`; one that is missing is left out. `edge` is what runs."""
    installed = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # The package index has a distribution of that name that is somebody else's.
            installed[package] = __version__ if package == "edge" else metadata.version(package)
    return installed


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Digest every file of `folder` and write `edge.json` there. Returns the completed manifest.

    Its versions have edge's own too.

    Raises InputError for a file whose name is no text.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest.files = {
        name: {"size": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in names
        if name != FILE
    }
    rows = "".join(f"{name}\0{entry['sha256']}\n" for name, entry in manifest.files.items())
    try:
        manifest.digest = "sha256:" + hashlib.sha256(rows.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        names = [name for name in manifest.files if not name.isprintable()]
        raise InputError(
            f"{folder}: the names {names!a} are no text in this locale", "rename them"
        ) from error
    manifest.versions = versions("edge") | manifest.versions
    manifest.created = manifest.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    json_file.write(folder / FILE, asdict(manifest))
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest of `folder`.

    Raises InputError where the folder or its `edge.json` is missing, unreadable, of a newer schema, or has a
    field of another type than Manifest says.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}", "check the path, or run the stage that makes it")
    path = folder / FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no {FILE}: it was not written by edge", "give a folder that edge made"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data.get("schema", SCHEMA) if isinstance(data, dict) else SCHEMA
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(f"{path} has schema {schema}, this version reads up to {SCHEMA}", "update edge")
        manifest = msgspec.convert(data, Manifest)
        if any(not {"path", "digest"} <= parent.keys() for parent in manifest.parents):
            raise ValueError("an entry lacks path or digest - at `$.parents`")
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", "run the stage that made this folder again"
        ) from error


def check_free(folder: Path, need: int) -> None:
    """Raise InputError unless the disk under `folder` has `need` bytes free (and a tenth more)."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < need * 1.1:
        raise InputError(
            f"{folder} needs about {in_units(need)}, the disk has {in_units(free)} free",
            "free some space, or choose a folder on another disk",
        )


def in_units(count: int) -> str:
    """`count` bytes in the largest unit of which there is one, such as "3.2 MiB"."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:,.1f} {unit}"
    return f"{count} bytes"


def check_target(target: Path, overwrite: bool) -> None:
    """Raise ExistsError unless `target` may be written: absent, empty, or ours with `overwrite`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ExistsError(f"{target} is a file; a folder must be written there", "choose another folder")
    if not any(target.iterdir()):
        return
    if not (target / FILE).is_file():
        raise ExistsError(
            f"{target} holds files that edge did not write; it will not replace them",
            "choose another folder, or move them away",
        )
    if not overwrite:
        old = read(target)
        raise ExistsError(
            f"{target} already holds {old.stage} '{old.name}', made {old.created}",
            "add --overwrite to replace it",
        )


@contextlib.contextmanager
def publish(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling folder to write into; rename it to `target` when the block ends well.

    On any exception the sibling is removed and what stood at `target` is untouched. What a killed process
    left of `target` is swept first. The manifest must have been written (`write`) before the block ends.
    Raises what `check_target` raises, UsageError for a name that Windows refuses, ExistsError where it holds
    what stands at `target` open.
    """
    windows_names.check(target)
    check_target(target, overwrite)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, target.name)
    partial = _sibling(target, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        assert (partial / FILE).is_file(), "a stage must write its manifest before it publishes"
        _let_read(partial)
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _let_read(folder: Path) -> None:
    """Give files the rights of `folder`, by the umask: safetensors writes its own for their owner alone."""
    rights = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        about = path.lstat()
        # What is linked is another's too.
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
            path.chmod(stat.S_IMODE(about.st_mode) | rights)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what `publish` left in `folder`, of the target `name` or of all, in processes that are gone.

    A target whose process was killed between the two renames is put back. What processes of other hosts write
    stays: whether they live cannot be seen from here.
    """
    for path in folder.iterdir():
        match = _SIBLING.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or not path.is_dir():
            continue
        if match["host"] not in (None, _host()) or _writes(int(match["pid"]), path):
            continue
        target = folder / match["name"]
        if match["kind"] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


_SIBLING = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-(?:(?P<host>[\w-]*)\.)?(?P<pid>\d+)")


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{_host()}.{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())[:40]


def _writes(pid: int, path: Path) -> bool:
    """Whether process `pid` lives and may be what writes `path`."""
    touched = max(path.stat().st_mtime, path.stat().st_ctime)  # a rename changes the second alone
    return alive(pid, touched)


def alive(pid: int, since: float) -> bool:
    """Whether process `pid` of this host runs, and began before `since`, so no later one of its number."""
    import psutil  # late: reading a manifest needs none

    try:
        process = psutil.Process(pid)
        return bool(process.create_time() <= since + 2 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _swap(partial: Path, target: Path) -> None:
    old = _sibling(target, "old")
    if target.exists():
        try:
            target.rename(old)
        except PermissionError as error:  # Windows, of a folder in which a file is open
            raise ExistsError(
                f"{target} cannot be replaced: another program has it open, or you may not write there",
                "stop what serves or shows it, then run this again",
            ) from error
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)

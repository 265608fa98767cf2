"""The model hub: what is missing is downloaded into the hub's own cache, and errors say what to do.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold, as huggingface_hub reads them when it is imported.
The library itself starts a file anew when the process that fetched it has ended, which at several gigabytes
means never to arrive on a bad line: large files are fetched here, and go on where they stopped.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from convert.model import modelscope
from convert.model.hf_folder import PATTERNS, check_folder, converts
from edge.artefact import manifest
from edge.errors import EdgeError, InputError, UnavailableError
from edge.machine import proxies
from edge.progress import report

DEFAULT = "smollm2-135m-instruct"  # the embedded model
LARGE = 16 * 2**20  # bytes from which a file is worth resuming
_TRIES = 5  # connections in a row that bring nothing
_PAUSES_S = (1, 1, 2, 4, 8)  # after so many of them
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a model's id on the hub, ORG/NAME."""
    # models/x and runs/x are our own folders, there or not: never asked of the hub.
    return bool(_HUB_ID.fullmatch(name)) and name.split("/")[0] not in ("models", "runs")


def resolve(name: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The transformers folder behind `name`: an existing folder, or a hub id, downloaded or from the cache.

    cache: the folder of the cache, in place of the hub's own. Raises InputError where it is no transformers
    folder with safetensors; as `snapshot` for the hub.
    """
    path = Path(name)
    if not path.exists() and is_hub_id(name):
        return check_folder(snapshot(name, revision, cache=cache), shown=name).path
    if path.is_dir():
        # The files of a run's own folder are links to those of its model.
        merged = path / "merged"
        return check_folder(merged if (merged / manifest.FILE).is_file() else path, shown=name).path
    if path.is_file():
        raise InputError(
            f"{name} is a file; training needs a transformers folder with safetensors",
            "a GGUF file can be served: edge serve FILE",
        )
    command = "edge pull" if path.name == DEFAULT else "edge pull ORG/NAME"
    raise InputError(f"no such model folder: {name}", f"get it: {command}")


def snapshot(
    name: str, revision: str | None = None, *, cache: str | None = None, console: Console | None = None
) -> Path:
    """Download what is missing of `name` into the hub's cache; returns the snapshot's folder.

    From ModelScope where USE_MODELSCOPE_HUB asks for it. cache: the folder of the cache; None: as HF_HOME (or
    MODELSCOPE_CACHE) says. An interrupted download goes on where it stopped.
    Raises UnavailableError where the hub cannot be reached or refuses, InputError for an unknown name or
    revision, no safetensors, or a full disk.
    """
    if modelscope.asked():
        # Branches are called otherwise there.
        return modelscope.snapshot(name, None if revision == "main" else revision, cache=cache)
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": list(PATTERNS),
        "ignore_patterns": ["*/*"],
        "cache_dir": cache,
    }
    try:
        if not constants.HF_HUB_OFFLINE:
            # Not reachable: the cache may still have it all, and the next call says why if not.
            with contextlib.suppress(errors.DryRunError):
                plan = hub.snapshot_download(**wanted, dry_run=True)
                _check_plan(name, plan, Path(cache or constants.HF_HUB_CACHE))
                for file in plan:
                    if file.will_download and (file.file_size or 0) >= LARGE:
                        _fetch(name, file, console or Console(stderr=True))
        return Path(hub.snapshot_download(**wanted))
    except EdgeError:
        raise
    except Exception as error:
        _refuse(name, revision, error)


def _check_plan(name: str, plan: list[Any], cache: Path) -> None:
    if not any(file.filename.endswith(".safetensors") for file in plan):
        raise InputError(
            f"{name} has no safetensors on the hub (pickles are not loaded)",
            "if you trust it, convert it: " + converts("AutoModelForCausalLM", name),
        )
    missing = sum(file.file_size or 0 for file in plan if file.will_download)
    manifest.check_free(cache, missing)


def _fetch(name: str, file: Any, console: Console) -> None:
    """Fetch one file into the cache's blobs, going on from a part that an earlier process left there.

    file: a DryRunFileInfo. Only where the hub names the sha256, so that a part of another file is found out.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import WeakFileLock

    url = hub.hf_hub_url(name, file.filename, revision=file.commit_hash)
    sha256 = hub.get_hf_file_metadata(url).etag or ""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return  # left to the library
    blob = Path(file.local_path).parents[2] / "blobs" / sha256
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{sha256}.edge-part")
    with WeakFileLock(f"{part}.lock"):
        if not blob.exists():
            _download(url, part, file.filename, file.file_size, console)
            if manifest.file_digest(part) != sha256:
                part.unlink()
                raise UnavailableError(
                    f"{file.filename} of {name} arrived damaged (sha256 differs)", "run it again"
                )
            part.replace(blob)


def _download(url: str, part: Path, shown: str, size: int, console: Console) -> None:
    """Append to `part` until it has `size` bytes; a dropped connection is taken up again."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress, part.open("ab") as out:
        have = out.tell()
        bar = progress.add_task(shown, total=size, completed=have)
        idle = 0
        while have < size:
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
            before = have
            try:
                with get_session().stream(
                    "GET",
                    url,
                    headers=headers,
                    follow_redirects=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                ) as response:
                    hf_raise_for_status(response)
                    if response.status_code != 206:  # it sends the whole file whatever was asked
                        have = 0
                        out.truncate(0)
                    for chunk in response.iter_bytes(2**20):
                        out.write(chunk)
                        have += len(chunk)
                        progress.update(bar, completed=have)
                        report(f"downloading {shown}", have, size, unit="bytes")
            except httpx2.TransportError:
                if have <= before and idle + 1 >= _TRIES:
                    raise
            idle = 0 if have > before else idle + 1
            if have < size:
                if idle >= _TRIES:
                    raise UnavailableError(f"{shown} ends after {have:,} of {size:,} bytes", "run it again")
                time.sleep(_PAUSES_S[idle])


def _refuse(name: str, revision: str | None, error: Exception) -> NoReturn:
    """What went wrong at the hub, in words that say what to do."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        raise error
    if isinstance(error, errors.GatedRepoError):
        raise UnavailableError(
            f"{name} is gated: its owner wants you to accept terms first",
            f"accept them at {endpoint}/{name}, then `hf auth login`, or set HF_TOKEN",
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise InputError(
            f"{endpoint} has no model {name}, or it is private",
            "check the name (ORG/NAME); for a private one `hf auth login`, or set HF_TOKEN",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise InputError(f"{name} has no revision {revision}", "give a branch, a tag or a commit") from error
    if isinstance(error, errors.HFValidationError):
        raise InputError(f"{name} is no hub id: {error}", "ORG/NAME") from error
    if constants.HF_HUB_OFFLINE:
        raise UnavailableError(
            f"{name} ({revision or 'main'}) is not complete in the cache {constants.HF_HUB_CACHE}, "
            "and HF_HUB_OFFLINE forbids to download it",
            "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE), or give a folder",
        ) from error
    hint = (
        f"HF_ENDPOINT is {endpoint}: where it cannot be reached (from China, say), set HF_ENDPOINT to "
        "a mirror that you trust, or fetch the files in another way and give their folder: edge pull PATH"
    )
    cause = error.__cause__ or error
    response = getattr(error, "response", None) or getattr(cause, "response", None)
    reason = f"HTTP {response.status_code}" if response is not None else " ".join(str(cause).split())[:300]
    if response is not None and response.status_code in (401, 403):
        hint = "`hf auth login` with an account that may read it, or set HF_TOKEN"
    elif response is None:
        hint = proxies.problem("socksio") or hint
    raise UnavailableError(f"{name} could not be downloaded from {endpoint}: {reason}", hint) from error

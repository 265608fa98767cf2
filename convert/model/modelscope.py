"""Models and data sets on ModelScope, by its own library, which goes on with what it began and checks sha256.

MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE and MODELSCOPE_API_TOKEN hold, as modelscope-hub reads them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from convert.model.hf_folder import PATTERNS, converts
from edge.artefact import manifest
from edge.errors import EdgeError, InputError, UnavailableError
from edge.machine import proxies
from edge.setup import install_command

HUBS = ("huggingface", "modelscope")
# Beside a data set's rows: what describes them.
_NO_ROWS = ("dataset_infos.json", "dataset_info.json", "configuration.json")


def asked(hub: str | None = None) -> bool:
    """Whether models come from ModelScope: as `hub` says, or else USE_MODELSCOPE_HUB."""
    return hub == "modelscope" if hub else os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true")


def snapshot(name: str, revision: str | None = None, *, cache: str | None = None) -> Path:
    """Download what is missing of the model `name`; returns its folder.

    cache: the folder of the cache; None: the library's. Raises UnavailableError where the hub cannot be
    reached or refuses, or the package is missing; InputError for an unknown name or revision, no safetensors,
    or a full disk.
    """
    return _repository(name, "model", revision, cache)


def dataset(name: str, suffixes: tuple[str, ...]) -> Path:
    """Download the files of the data set `name` that end with one of `suffixes`. Raises as `snapshot`."""
    return _repository(name, "dataset", None, None, suffixes)


def _repository(
    name: str, kind: str, revision: str | None, cache: str | None, suffixes: tuple[str, ...] = ()
) -> Path:
    try:
        from modelscope_hub import HubApi, HubConfig
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{name}: ModelScope needs the package 'modelscope-hub'",
            install_command("modelscope"),
        ) from error
    config = HubConfig()
    api = HubApi(config)
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache}
    try:
        try:
            files = api.list_repo_files(name, kind, revision=revision)
        except (ConnectionError, TimeoutError) as error:
            # Not reachable: the cache may have it all.
            try:
                return Path(api.download_repo(name, kind, local_files_only=True, **where))
            except Exception:
                raise error from None
        wanted = [file for file in files if not file.is_dir and _is_wanted(file.path, suffixes)]
        if not suffixes and not any(file.path.endswith(".safetensors") for file in wanted):
            raise InputError(
                f"{name} has no safetensors on ModelScope (pickles are not loaded)",
                "if you trust it, fetch it and convert it: " + converts("AutoModelForCausalLM", name),
            )
        if not wanted:
            raise InputError(f"{name} on ModelScope has no files of {', '.join(suffixes)}", "check its name")
        folder = Path(cache or config.cache_dir)
        manifest.check_free(folder, sum(file.size or 0 for file in wanted))
        entries = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in wanted]
        return Path(api.download_repo(name, kind, file_list=entries, **where))
    except EdgeError:
        raise
    except Exception as error:
        _refuse(name, revision, config.endpoint, error)


def _is_wanted(path: str, suffixes: tuple[str, ...]) -> bool:
    file = PurePosixPath(path)
    if suffixes:
        return file.suffix.lower() in suffixes and file.name not in _NO_ROWS
    return len(file.parts) == 1 and any(file.match(pattern) for pattern in PATTERNS)


def _refuse(name: str, revision: str | None, endpoint: str | None, error: Exception) -> NoReturn:
    """What went wrong, in words that say what to do."""
    from modelscope_hub import errors

    causes = [error, *getattr(error, "failed_files", {}).values()]
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        raise error
    cause = causes[-1]
    if isinstance(cause, errors.NotExistError):
        at = f" at {revision}" if revision else ""
        raise InputError(
            f"{endpoint} has no {name}{at}, or it is private",
            "check the name (ORG/NAME) and revision; for a private one set MODELSCOPE_API_TOKEN",
        ) from error
    if isinstance(cause, (errors.AuthenticationError, errors.PermissionDeniedError)):
        raise UnavailableError(
            f"{endpoint} does not let you read {name}: {cause}", "set MODELSCOPE_API_TOKEN"
        ) from error
    if isinstance(cause, errors.FileIntegrityError):
        raise UnavailableError(f"a file of {name} arrived damaged: {cause}", "run it again") from error
    raise UnavailableError(
        f"{name} could not be downloaded from {endpoint}: {' '.join(str(cause).split())[:300]}",
        # "socks" is PySocks, by which requests reaches such proxies.
        proxies.problem("socks") or "run it again: it goes on where it stopped; or give a folder",
    ) from error

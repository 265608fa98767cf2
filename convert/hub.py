"""The model hub: what is missing is downloaded into the hub's own cache, and errors say what to do.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold, as huggingface_hub reads them when it is imported.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any, NoReturn

from convert.folder import PATTERNS, converts
from edge import manifest
from edge.errors import EdgeError, InputError, UnavailableError


def snapshot(name: str, revision: str | None = None) -> Path:
    """Download what is missing of `name` into the hub's cache (HF_HOME); returns the snapshot's folder.

    An interrupted download goes on where it stopped. Raises UnavailableError where the hub cannot be reached
    or refuses, InputError for an unknown name or revision, no safetensors, or a full disk.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": list(PATTERNS),
        "ignore_patterns": ["*/*"],
    }
    try:
        if not constants.HF_HUB_OFFLINE:
            # Not reachable: the cache may still have it all, and the next call says why if not.
            with contextlib.suppress(errors.DryRunError):
                _check_plan(name, hub.snapshot_download(**wanted, dry_run=True))
        return Path(hub.snapshot_download(**wanted))
    except EdgeError:
        raise
    except Exception as error:
        _refuse(name, revision, error)


def _check_plan(name: str, plan: list[Any]) -> None:
    from huggingface_hub import constants

    if not any(one.filename.endswith(".safetensors") for one in plan):
        raise InputError(
            f"{name} has no safetensors on the hub (pickles are not loaded)",
            "if you trust it, convert it: " + converts("AutoModelForCausalLM", name),
        )
    missing = sum(one.file_size or 0 for one in plan if one.will_download)
    manifest.check_free(Path(constants.HF_HUB_CACHE), missing)


def _refuse(name: str, revision: str | None, error: Exception) -> NoReturn:
    """What went wrong at the hub, in words that say what to do."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    mirror = (
        f"HF_ENDPOINT is {endpoint}: where it cannot be reached (from China, say), set HF_ENDPOINT to "
        "a mirror that you trust, or fetch the files in another way and give their folder: edge pull PATH"
    )
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
    response = getattr(error, "response", None)
    cause = error.__cause__ or error
    said = f"HTTP {response.status_code}" if response is not None else " ".join(str(cause).split())[:300]
    if response is not None and response.status_code in (401, 403):
        mirror = "`hf auth login` with an account that may read it, or set HF_TOKEN"
    raise UnavailableError(f"{name} could not be downloaded from {endpoint}: {said}", mirror) from error

"""Which paths Windows refuses, or takes for another: said before anything is written there."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path, PureWindowsPath

from edge.errors import UsageError

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
# A path has so many characters there, its end included, and what stages write inside of a folder needs some.
_LONGEST, _INSIDE = 259, 100


def fault(path: PureWindowsPath, *, long: bool) -> str:
    """What is wrong with the path there, as the end of a sentence, or "". long: long paths are on."""
    if path.drive and not path.root:
        return f"is taken for a place on the drive or stream {path.drive}"
    for name in path.parts[1:] if path.anchor else path.parts:
        if name == "..":
            continue
        if _DEVICE.fullmatch(name):
            return f"has the part {name!r}, which is a device"
        if match := _FORBIDDEN.search(name):
            return f"has {match[0]!r} in the part {name!r}"
        if name.endswith((".", " ")):
            return f"has the part {name!r}, whose last character is cut off"
    if not long and len(str(path)) > _LONGEST - _INSIDE:
        return f"has {len(str(path))} characters, and its files would have more than {_LONGEST}"
    return ""


def check(path: Path) -> None:
    """Raise UsageError on Windows for a path that cannot be written under its name."""
    if sys.platform != "win32":
        return
    long = bool(ctypes.windll.ntdll.RtlAreLongPathsEnabled())
    if problem := fault(PureWindowsPath(path), long=True) or fault(
        PureWindowsPath(path.absolute()), long=long
    ):
        raise UsageError(f"Windows cannot write {path}: it {problem}", "choose another, shorter name")

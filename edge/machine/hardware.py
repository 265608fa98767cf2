"""What this machine offers to this process: cores, memory, NVIDIA GPUs, the user's cache folder. No torch.

Threads are physical (or performance) cores, because decoding is bound by memory: a second thread on the same
core only adds waiting, and one efficiency core makes all the others wait at each barrier. In containers the
affinity mask and the cgroups' limits (v1 and v2) bound cores and memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge.artefact.manifest import in_units
from edge.errors import UnavailableError

ROOT = Path("/")
# CPU features that decide which kernels run, by their names in /proc/cpuinfo.
FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sme",
)  # fmt: skip
# Of these, those that multiply integers, the quickest first, and their names.
_PRODUCTS = {
    "amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "avx512bw": "AVX512",
    "avx2": "AVX2", "i8mm": "i8mm", "asimddp": "dotprod",
}  # fmt: skip

# Platform -> the variable that moves the folder for caches, and where it lies in the home folder.
_CACHES = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("HOME", "Library/Caches")}
_CACHE_VARIABLE, _CACHE_FOLDER = _CACHES.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
_CACHE_HINT = f"set {_CACHE_VARIABLE} to a folder that can be written"


@dataclass(frozen=True)
class Core:
    """One physical core: its logical CPUs, and whether it is of the fastest kind this machine has."""

    cpus: frozenset[int]
    performance: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes this process may use: `total` within the container's limits, `available` at this moment.

    limit: the limit that leaves the least, 0 without any; limit_file: the cgroup's file that sets it.
    """

    total: int
    available: int
    limit: int = 0
    limit_file: Path | None = None

    @property
    def within(self) -> str:
        """What a sentence about free memory ends with: the limit that it is measured by, if there is one."""
        return f" within the limit of {in_units(self.limit)} ({self.limit_file})" if self.limit else ""


@dataclass(frozen=True)
class GPU:
    """One NVIDIA GPU. Memory in bytes, 0 where the driver does not say; `cuda`: the driver's newest CUDA."""

    index: int
    name: str
    memory_total: int
    memory_free: int
    driver: str
    compute_capability: str
    cuda: str


def cpu_threads() -> int:
    """How many threads decode fastest: physical (or performance) cores within affinity and cgroup quota."""
    return usable_threads(_cores(), _affinity(), cpu_quota())


def usable_threads(cores: Iterable[Core], allowed: set[int] | None, quota: float | None) -> int:
    """Performance cores among `cores` that own an `allowed` CPU, bounded by a `quota` of CPUs; at least 1.

    `allowed` None: all CPUs. `quota` None: no limit; a fraction is rounded down, for the last thread would be
    throttled while the others wait for it.
    """
    usable = [core for core in cores if allowed is None or core.cpus & allowed]
    count = sum(core.performance for core in usable) or len(usable)
    if not count:
        count = len(allowed) if allowed else os.cpu_count() or 1
    if quota is not None:
        count = min(count, math.floor(quota))
    return max(1, count)


def _affinity() -> set[int] | None:
    if sys.platform == "darwin":
        return None
    try:
        return set(psutil.Process().cpu_affinity() or []) or None
    except (AttributeError, OSError, psutil.Error):
        return None


def _cores() -> list[Core]:
    if sys.platform == "darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        return [
            Core(frozenset({index})) for index in range(int(fast or psutil.cpu_count(logical=False) or 1))
        ]
    if sys.platform == "win32":
        return windows_cores(_windows_core_records())
    return linux_cores()


def linux_cores(root: Path = ROOT) -> list[Core]:
    """Cores from sysfs; empty where it tells nothing.

    Performance cores: those in Intel's `cpu_core` list, or those of more than half of the largest
    `cpu_capacity` (Arm big.LITTLE).
    """
    base = root / "sys/devices/system/cpu"
    siblings: set[frozenset[int]] = set()
    capacity: dict[int, int] = {}
    for folder in base.glob("cpu[0-9]*"):
        cpu = int(folder.name[3:])
        text = _read(folder / "topology/core_cpus_list") or _read(folder / "topology/thread_siblings_list")
        if text:
            siblings.add(frozenset(parse_cpu_list(text)))
        if (value := _read(folder / "cpu_capacity")).isdigit():
            capacity[cpu] = int(value)
    fast = parse_cpu_list(_read(root / "sys/devices/cpu_core/cpus"))
    if not fast and capacity:
        limit = max(capacity.values()) / 2
        fast = {cpu for cpu, value in capacity.items() if value > limit}
    return [Core(cpus, not fast or bool(cpus & fast)) for cpus in sorted(siblings, key=min)]


def parse_cpu_list(text: str) -> set[int]:
    """`"0-3,8"` -> {0, 1, 2, 3, 8} (the kernel's list format)."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def windows_cores(records: bytes) -> list[Core]:
    """Cores from GetLogicalProcessorInformationEx(RelationProcessorCore); the highest class is fast.

    A record: u32 relationship, u32 size, u8 flags, u8 efficiency class, 20 reserved bytes, u16 groups, then
    16 bytes a group (u64 mask, u16 group). CPUs are numbered 64 a group.
    """
    cores: list[tuple[int, frozenset[int]]] = []
    position = 0
    while position + 32 <= len(records):
        size = int.from_bytes(records[position + 4 : position + 8], "little")
        groups = int.from_bytes(records[position + 30 : position + 32], "little")
        cpus: set[int] = set()
        for index in range(groups):
            entry = records[position + 32 + 16 * index : position + 48 + 16 * index]
            mask, group = int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:10], "little")
            cpus.update(64 * group + bit for bit in range(64) if mask >> bit & 1)
        cores.append((records[position + 9], frozenset(cpus)))
        position += max(size, 32)
    best = max((kind for kind, _ in cores), default=0)
    return [Core(cpus, kind == best) for kind, cpus in cores]


def _windows_core_records() -> bytes:
    if sys.platform != "win32":
        return b""
    call = ctypes.windll.kernel32.GetLogicalProcessorInformationEx
    size = ctypes.c_uint32(0)
    call(0, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if call(0, buffer, ctypes.byref(size)) else b""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cgroup_folders(controller: str, root: Path = ROOT) -> list[Path]:
    """This process's cgroup folders for `controller`, v1 and v2, innermost first, up to the mount.

    Inside a container the path in /proc/self/cgroup may be the host's: then only the mount itself is seen,
    and that is the container's own group.
    """
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controllers, base / controller]
        else:
            continue
        for mount in mounts:
            inner = mount / path.strip("/")
            folders += [
                folder for folder in (inner, *inner.parents) if folder == mount or mount in folder.parents
            ]
    return list(dict.fromkeys(folders))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the cgroup's bandwidth limit allows (the tightest of the hierarchy); None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory(root: Path = ROOT) -> Memory:
    """Memory within the cgroups' limits. Page cache that can be dropped counts as available.

    Above version 2's memory.high a process is slowed down until it is back below, so that is a limit too.
    """
    host = psutil.virtual_memory()
    limits: list[tuple[int, int, Path]] = []
    for folder in _cgroup_folders("memory", root):
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or "0"
        # Version 1 counts a group alone first; with the groups in it, as its usage does, under total_.
        cache = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        working = max(0, int(used) - int(cache[-1] if cache else 0))
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            # "max", and version 1's highest number, are no limits.
            if (text := _read(folder / name)).isdigit() and int(text) < host.total:
                limits.append((max(0, int(text) - working), int(text), folder / name))
    if not limits:
        return Memory(int(host.total), int(host.available))
    left, limit, file = min(limits)
    return Memory(min(size for _, size, _ in limits), min(int(host.available), left), limit, file)


def gpus() -> list[GPU]:
    """NVIDIA GPUs that `nvidia-smi` lists; empty without the tool, without a GPU or when it fails."""
    fields = "index,name,memory.total,memory.free,driver_version,compute_cap"
    rows = command_output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    return parse_gpus(rows, command_output(["nvidia-smi"])) if rows else []


def parse_gpus(rows: str, banner: str) -> list[GPU]:
    """GPUs from `nvidia-smi`'s CSV (memory in MiB) and the CUDA version from its banner."""
    version = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+(?:\.\d+)?)", banner)
    gpus = []
    for line in rows.splitlines():
        index, _, rest = line.partition(",")
        parts = [part.strip() for part in rest.rsplit(",", 4)]  # a name may hold a comma
        if len(parts) != 5 or not index.strip().isdigit():
            continue
        name, total, free, driver, capability = parts
        memory_total, memory_free = (int(size) * 2**20 if size.isdigit() else 0 for size in (total, free))
        cuda = version[1] if version else ""
        gpus.append(GPU(int(index), name, memory_total, memory_free, driver, capability, cuda))
    return gpus


def command_output(command: list[str]) -> str:
    """What a command prints, stripped; "" where it fails, is not there or takes longer than 30 s."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def _sysctl(name: str) -> str:
    return command_output(["sysctl", "-n", name])


def cache_dir() -> Path:
    """The user's cache folder for edge (not created): XDG, ~/Library/Caches or %LOCALAPPDATA%.

    Raises UnavailableError where this user has no home folder.
    """
    base = Path("" if sys.platform == "darwin" else os.environ.get(_CACHE_VARIABLE, ""))
    if not base.is_absolute():  # XDG's specification: a relative path is to be ignored
        try:
            base = Path.home() / _CACHE_FOLDER
        except RuntimeError as error:
            raise UnavailableError("this user has no home folder to keep results in", _CACHE_HINT) from error
    return base / "edge"


def writable_cache(name: str) -> Path:
    """The folder `name` of the cache, created. Raises UnavailableError where it cannot be written."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # an empty file can be made on a full disk, too
    except OSError as error:
        raise UnavailableError(
            f"{folder} cannot be written: {error.strerror}", f"free some space, or {_CACHE_HINT}"
        ) from error
    return folder


def apple_gpu() -> str:
    """The chip whose GPU Metal uses, which shares the system's memory; "" on any other machine."""
    return cpu_model() if sys.platform == "darwin" and platform.machine() == "arm64" else ""


def cpu_model() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(
            winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        ) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return _cpuinfo("model name|Model|Hardware") or platform.processor() or platform.machine()


def _cpuinfo(names: str) -> str:
    match = re.search(rf"^(?:{names})\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else ""


def cpu_flags(*, everything: bool = False) -> list[str]:
    """Those of FLAGS that this CPU has, or all that the system lists; empty where it does not tell."""
    if sys.platform == "win32":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return [name for name, code in (("avx", 39), ("avx2", 40), ("avx512f", 41)) if present(code)]
    if sys.platform == "darwin":
        text = " ".join(_sysctl(key) for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"))
        text = text.lower().replace("avx1.0", "avx")
        arm = {"asimd": "AdvSIMD", "asimdhp": "FEAT_FP16", "asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM"}
        arm |= {"bf16": "FEAT_BF16", "sme": "FEAT_SME"}
        text += " " + " ".join(name for name, key in arm.items() if _sysctl(f"hw.optional.arm.{key}") == "1")
    else:
        text = _cpuinfo("flags|Features")
    words = set(text.split())
    return sorted(words) if everything else [flag for flag in FLAGS if flag in words]


def describe() -> dict[str, Any]:
    """The machine's facts for a report. Memory in bytes."""
    ram = memory()
    return {
        "cpu": cpu_model(),
        "flags": cpu_flags(),
        "logical_cpus": os.cpu_count() or 1,
        "physical_cores": psutil.cpu_count(logical=False),
        "threads": cpu_threads(),
        "memory_total": ram.total,
        "memory_available": ram.available,
        "gpus": [vars(gpu) for gpu in gpus()],
        "os": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def processor(machine: Mapping[str, Any]) -> str:
    """The CPU of `describe`, and what multiplies integers quickest on it: `NAME, 2 cores (AVX2)`."""
    flags = machine.get("flags", ())
    quickest = next((name for flag, name in _PRODUCTS.items() if flag in flags), "")
    return f"{machine['cpu']}, {machine['threads']} cores" + (f" ({quickest})" if quickest else "")


def free_port() -> int:
    """A port of the loopback address that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

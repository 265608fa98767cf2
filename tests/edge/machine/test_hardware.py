"""Cores, quotas, memory limits and GPUs, on fake systems."""

from __future__ import annotations

import struct
from pathlib import Path

import psutil
import pytest

from edge.artefact import manifest
from edge.errors import UnavailableError
from edge.machine import hardware
from edge.machine.hardware import Core, linux_cores, usable_threads


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def sysfs(root: Path, cores: list[str]) -> Path:
    """A sysfs whose cores own the CPUs of each list, such as "0,8"."""
    files = {}
    for text in cores:
        for cpu in hardware.parse_cpu_list(text):
            files[f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"] = text
    return write(root, files)


def test_s18_eight_cores_of_two_threads(tmp_path: Path) -> None:
    cores = linux_cores(sysfs(tmp_path, [f"{n},{n + 8}" for n in range(8)]))
    assert len(cores) == 8
    assert usable_threads(cores, None, None) == 8
    assert usable_threads(cores, set(range(16)), None) == 8
    assert usable_threads(cores, {0, 8, 1}, None) == 2  # both threads of one core, one of another


def test_s18_eight_performance_and_twelve_efficiency_cores(tmp_path: Path) -> None:
    root = sysfs(tmp_path, [f"{2 * n}-{2 * n + 1}" for n in range(8)] + [str(n) for n in range(16, 28)])
    write(root, {"sys/devices/cpu_core/cpus": "0-15", "sys/devices/cpu_atom/cpus": "16-27"})
    cores = linux_cores(root)
    assert len(cores) == 20
    assert usable_threads(cores, None, None) == 8
    assert (
        usable_threads(cores, set(range(16, 28)), None) == 12
    )  # bound to the small ones: they are what there is


def test_big_little_by_capacity(tmp_path: Path) -> None:
    root = sysfs(tmp_path, [str(n) for n in range(8)])
    capacity = {n: 1024 if n == 7 else 870 if n > 3 else 330 for n in range(8)}
    write(root, {f"sys/devices/system/cpu/cpu{n}/cpu_capacity": str(c) for n, c in capacity.items()})
    assert usable_threads(linux_cores(root), None, None) == 4


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/box/job", "sys/fs/cgroup/box/cpu.max": "200000 100000"}, 2.0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (  # the tightest of the hierarchy
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            1.5,
        ),
        (  # version 1, and a path of the host that the container cannot see
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert hardware.cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "threads"), [(2.0, 2), (2.9, 2), (0.5, 1), (64.0, 8), (None, 8)])
def test_s18_quota_bounds_threads(quota: float | None, threads: int) -> None:
    assert usable_threads([Core(frozenset({n})) for n in range(8)], None, quota) == threads


def test_unknown_topology_falls_back_to_allowed_cpus(tmp_path: Path) -> None:
    assert linux_cores(tmp_path) == []
    assert usable_threads([], {3, 4, 5}, None) == 3


def test_windows_records() -> None:
    def record(kind: int, mask: int, group: int = 0) -> bytes:
        return struct.pack("<IIBB20xHQH6x", 0, 48, 1, kind, 1, mask, group)

    data = b"".join(record(1, 0b11 << 2 * n) for n in range(8)) + b"".join(
        record(0, 1 << n) for n in range(16, 28)
    )
    cores = hardware.windows_cores(data)
    assert len(cores) == 20
    assert cores[1].cpus == {2, 3}
    assert usable_threads(cores, None, None) == 8
    assert hardware.windows_cores(record(0, 1, group=1))[0].cpus == {64}


@pytest.mark.parametrize(
    ("files", "total", "available", "limit", "file"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                "job/memory.max": "1000000",
                "job/memory.high": "max",
                "job/memory.current": "700000",
                "job/memory.stat": "anon 1\ninactive_file 200000\nactive_file 5",
            },
            1_000_000,
            500_000,
            1_000_000,
            "job/memory.max",
            id="v2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/",
                "memory.max": "1000000",
                "memory.high": "800000",
                "memory.current": "900000",
                "memory.stat": "inactive_file 1000",
            },
            800_000,
            0,
            800_000,
            "memory.high",
            id="v2-high",
        ),
        # The outer group leaves less, since another one in it is at work.
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/job",
                "pod/memory.max": "3000000",
                "pod/memory.current": "2900000",
                "pod/job/memory.max": "1000000",
                "pod/job/memory.current": "100000",
            },
            1_000_000,
            100_000,
            3_000_000,
            "pod/memory.max",
            id="v2-nested",
        ),
        # The path is the host's, of which a container sees its own group alone.
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n0::/docker/abc",
                "memory/memory.limit_in_bytes": "1000000",
                "memory/memory.usage_in_bytes": "700000",
                "memory/memory.stat": "inactive_file 3\ntotal_inactive_file 200000",
            },
            1_000_000,
            500_000,
            1_000_000,
            "memory/memory.limit_in_bytes",
            id="v1",
        ),
    ],
)
def test_memory_is_what_the_tightest_cgroup_leaves(
    tmp_path: Path, files: dict[str, str], total: int, available: int, limit: int, file: str
) -> None:
    groups = tmp_path / "sys/fs/cgroup"
    write(tmp_path, {"proc/self/cgroup": files.pop("proc/self/cgroup")})
    found = hardware.memory(write(groups, files).parents[2])
    assert found == hardware.Memory(total, available, limit, groups / file)
    assert found.within == f" within the limit of {manifest.in_units(limit)} ({groups / file})"


def test_memory_without_limit_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    }
    for found in (hardware.memory(write(tmp_path, files)), hardware.memory(tmp_path / "none")):
        assert (found.total, found.limit, found.within) == (psutil.virtual_memory().total, 0, "")


def test_gpus_from_csv() -> None:
    rows = (
        "0, NVIDIA GeForce RTX 4060 Laptop GPU, 8188, 7800, 576.02, 8.9\n"
        "1, Odd, Name, [N/A], [N/A], 576.02, 12.1\nno devices\n"
    )
    banner = "| NVIDIA-SMI 576.02   Driver Version: 576.02   CUDA Version: 12.9  |"
    first, second = hardware.parse_gpus(rows, banner)
    assert first == hardware.GPU(
        0, "NVIDIA GeForce RTX 4060 Laptop GPU", 8188 * 2**20, 7800 * 2**20, "576.02", "8.9", "12.9"
    )
    assert (second.name, second.memory_total) == ("Odd, Name", 0)


def test_gpus_without_the_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus() == []


def test_cache_dir_ignores_a_relative_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert hardware.cache_dir() == tmp_path / ".cache" / "edge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "缓 存"))
    assert hardware.cache_dir() == tmp_path / "缓 存" / "edge"


def test_describe_is_consistent() -> None:
    found = hardware.describe()
    assert 1 <= found["threads"] <= found["logical_cpus"]
    assert 0 < found["memory_available"] <= found["memory_total"]
    assert found["cpu"]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8"], " (AMX)"),
        (["avx", "avx2", "avx512f", "avx512bw"], " (AVX512)"),
        (["avx", "avx2", "fma"], " (AVX2)"),
        (["asimd", "asimddp", "i8mm"], " (i8mm)"),
        ([], ""),
    ],
)
def test_a_report_names_the_instructions_that_decide(flags: list[str], shown: str) -> None:
    assert hardware.processor({"cpu": "X", "threads": 2, "flags": flags}) == f"X, 2 cores{shown}"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path / "edge")
    assert hardware.writable_cache("tune") == tmp_path / "edge" / "tune"
    assert list((tmp_path / "edge" / "tune").iterdir()) == []
    (tmp_path / "edge" / "wheels").write_text("a file")
    with pytest.raises(UnavailableError, match=r"wheels cannot be written: .+\n  .*set "):
        hardware.writable_cache("wheels")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(UnavailableError, match="no home folder"):
        hardware.writable_cache("tune")

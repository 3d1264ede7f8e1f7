"""Is this machine fit to train on: devices, backends, links, limits, versions, each with a fix of one line.

Called by `sixfold doctor`. It reads what the system says and changes nothing; what ranks make of it is
tried by `selftest`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from sixfold.base.units import bytes_text
from sixfold.launch.resources import default_ranks, num_cores
from sixfold.mesh.host.limits import free_bytes
from sixfold.monitor.hardware import PEAK_SIZE, bf16_speedup
from sixfold.monitor.selftest import run

Status = Literal["ok", "note", "fail"]
OLDEST_TORCH = (2, 11)
SHM_BYTES = 2**30
OPEN_FILES = 4096
PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "tokenizers", "transformers", "pyarrow", "peft")
SELF_TEST_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: its name.
        status: "fail" where training cannot work, "note" where it can, but worse or less.
        found: what it is, in words.
        fix: one line that mends it; empty where nothing is to be mended.
    """

    what: str
    status: Status
    found: str
    fix: str = ""


def check(*, self_test: bool = True) -> Iterator[Finding]:
    """Every finding, one after the other; the self-test, which takes seconds, comes last."""
    for look in (_python, _torch, _packages, _devices, _backends, _links, _host_name):
        yield look()
    yield from (_shared_memory(), _open_files(), _memory(), _cache(), _compiler())
    if self_test:
        yield _self_test()


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Finding:
    version = torch.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers >= OLDEST_TORCH:
        return Finding("torch", "ok", version)
    oldest = ".".join(map(str, OLDEST_TORCH))
    return Finding("torch", "fail", f"{version}, older than {oldest}", f"pip install 'torch>={oldest}'")


def _packages() -> Finding:
    found, missing = [], []
    for name in PACKAGES[1:]:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    return Finding("packages", "ok", ", ".join(found) + absent)


def _devices() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("devices", "ok", ", ".join(names))
    speedup = bf16_speedup(PEAK_SIZE, PEAK_SIZE, PEAK_SIZE, threads=1)
    found = f"no GPU; {num_cores()} cores of {_processor()}, bf16 products {speedup:.2g} x as fast as fp32"
    return Finding("devices", "ok", found)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _backends() -> Finding:
    if not dist.is_available():
        return Finding(
            "backends", "fail", "torch.distributed is not in this build", "pip install torch from PyPI"
        )
    able = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    names = ", ".join(name for name, there in able.items() if there) or "none"
    if torch.cuda.is_available() and not able["nccl"]:
        return Finding("backends", "fail", f"{names}; GPUs need nccl", "install a CUDA build of torch")
    if not able["gloo"]:
        return Finding("backends", "fail", f"{names}; CPUs need gloo", "pip install torch from PyPI")
    return Finding("backends", "ok", names)


def _links() -> Finding:
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return Finding("links", "ok", "between processes of this machine: shared memory, loopback")
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not apart:
        return Finding("links", "ok", f"all {len(pairs)} pairs of GPUs reach each other's memory")
    return Finding(
        "links",
        "note",
        f"{len(apart)} of {len(pairs)} pairs of GPUs exchange through the host, for example {apart[0]}",
        "see nvidia-smi topo -m; put the axes that talk most on GPUs that are linked",
    )


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        return Finding("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Finding(
            "host name",
            "note",
            f"{name} is no address: {error}",
            f"echo '127.0.0.1 {name}' >> /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )


def _shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    if not path.is_dir():
        return Finding("/dev/shm", "note", "there is none, so ranks of this host exchange over the network")
    usage = shutil.disk_usage(path)
    text = f"{bytes_text(usage.free)} free of {bytes_text(usage.total)}"
    if usage.free >= SHM_BYTES:
        return Finding("/dev/shm", "ok", text)
    return Finding("/dev/shm", "note", text, "mount -o remount,size=8G /dev/shm, or docker run --shm-size=8g")


def _open_files() -> Finding:
    try:
        # There is no such module on Windows.
        import resource
    except ImportError:
        return Finding("open files", "ok", "not limited on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (at most {hard})"
    if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", text)
    return Finding("open files", "note", text, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")


def _memory() -> Finding:
    known = free_bytes()
    if known is None:
        return Finding("memory", "note", "the system does not say how much is free")
    free, limit = known
    return Finding("memory", "ok", f"{bytes_text(free)} free ({limit})")


def _cache() -> Finding:
    nearest = Path("~/.cache/sixfold").expanduser()
    while not nearest.exists():
        nearest = nearest.parent
    if os.access(nearest, os.W_OK):
        free = shutil.disk_usage(nearest).free
        return Finding("cache", "ok", f"~/.cache/sixfold, {bytes_text(free)} free")
    return Finding("cache", "note", f"{nearest} cannot be written", "set data.cache to a folder of yours")


def _compiler(find: Callable[[str], str | None] = shutil.which) -> Finding:
    found = next(filter(None, map(find, ("c++", "g++", "clang++"))), None)
    if found is not None:
        return Finding("compiler", "ok", f'{found}, for layout.compile = "inductor"')
    return Finding(
        "compiler",
        "note",
        'no C++ compiler, so layout.compile = "inductor" cannot be used',
        "apt-get install g++, or leave layout.compile unset",
    )


def _self_test() -> Finding:
    ranks = max(2, min(4, default_ranks()[0])) if not torch.cuda.is_available() else default_ranks()[0]
    if ranks == 1:
        return Finding("self-test", "ok", "one GPU: nothing to exchange")
    outcome = run(ranks, SELF_TEST_S)
    if outcome.problem is not None:
        return Finding(
            "self-test",
            "fail",
            outcome.problem,
            "see the findings above; GLOO_SOCKET_IFNAME=lo helps where the host name is no address",
        )
    rates = ", ".join(f"{name} {rate:.0f} MB/s" for name, rate in outcome.rates.items())
    return Finding("self-test", "ok", f"{ranks} ranks summed 4 MB right: {rates}")

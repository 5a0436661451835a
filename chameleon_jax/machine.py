"""What a result was made on: devices, memory, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from chameleon_jax import __version__
from chameleon_jax.errors import ROOT, UserError, one_line

# What results depend on; accelerator plug-ins and optional packages where they are installed.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "pillow",
    "av",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "libtpu",
)

# What changes results or speed without being seen: variables of XLA, of libtpu and of JAX.
SETTINGS = re.compile(r"^(XLA_|LIBTPU_|JAX_|NCCL_|TF_GPU_|OMP_NUM_THREADS$)")


class DeviceError(UserError):
    """JAX finds no device of the kind that was asked for. The message is one line."""


def device() -> jax.Device:
    """The first device.

    Raises:
      DeviceError: JAX cannot start, e.g. because JAX_PLATFORMS names what is not there.
    """
    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the second one without a word
        asked = os.environ.get("JAX_PLATFORMS")
        advice = "see the installation guide of JAX"
        if asked:
            advice = f"JAX_PLATFORMS is {asked!r}; change it, or install what it names"
        reason = f" ({one_line(error)})" if str(error) else ""
        raise DeviceError(f"JAX finds no device{reason}; {advice}") from None


def hardware(used: int = 1) -> dict[str, Any]:
    """Platform, device, processor and the cores that this process may use.

    Args:
      used: devices that something was measured on.
    """
    first = device()
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "devices_used": used,
        "cpu": _processor(),
        "cores": cores,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this project and of those of `PACKAGES` that are installed."""
    found = {"chameleon_jax": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this project's clone, with "+" behind it if files differ; None if there is
    none, or no git.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def settings() -> dict[str, str]:
    """Variables of the environment that change how JAX computes, see `SETTINGS`."""
    return {name: os.environ[name] for name in sorted(os.environ) if SETTINGS.search(name)}


def load() -> list[float] | None:
    """Processes that ran or waited, on average over 1, 5 and 15 minutes; None where unknown."""
    return [round(mean, 2) for mean in os.getloadavg()] if hasattr(os, "getloadavg") else None


def memory_in_use() -> int:
    """Bytes in use now: on the fullest accelerator of this process, or resident on a CPU."""
    found = _device_memory("bytes_in_use")
    if found is not None:
        return found
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident() or 0


def peak_memory() -> int:
    """Largest number of bytes that were in use, as in `memory_in_use`."""
    found = _device_memory("peak_bytes_in_use")
    return found if found is not None else peak_resident() or 0


def peak_device_memory() -> int | None:
    """Largest number of bytes in use on the fullest accelerator; None on a CPU."""
    return _device_memory("peak_bytes_in_use")


def _device_memory(name: str) -> int | None:
    """Largest of a figure of the devices' allocators; None where there is no such figure."""
    figures = [(one.memory_stats() or {}).get(name) for one in jax.local_devices()]
    return max((figure for figure in figures if figure is not None), default=None)


def peak_resident() -> int | None:
    """Largest resident memory of this process in bytes; None where the system does not say."""
    # The kernel's own count, where there is one: getrusage also counts the parent before a fork.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found is not None:
        return 1024 * int(found[1])
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    if found is not None:
        return found[1].strip()
    return platform.processor() or platform.machine()

"""What this machine is: processor, instruction sets, versions."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tersor.core.report import Environment

# Instruction sets that decide how integer and half-precision kernels run.
_RELEVANT = re.compile(r"^(avx.*|amx.*|fma|f16c|sse4_.*|asimd.*|i8mm|bf16|sve.*)$")
_PACKAGES = ("tersor", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's instruction-set flags that matter here; empty if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return frozenset(flag for flag in (found[1].split() if found else []) if _RELEVANT.match(flag))


def saturates_int8() -> bool:
    """Whether int8 kernels may overflow 16-bit sums here: x86 without VNNI, or a processor that does not tell.

    `vpmaddubsw` adds two products of uint8 and int8 in a saturating int16; weights of 7 bits cannot overflow it.
    """
    if platform.machine().lower() in {"aarch64", "arm64"}:
        return False
    return not any("vnni" in flag for flag in cpu_flags())


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of everything whose kernels or formats matter."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(*, threads: int, seed: int) -> Environment:
    """Everything about this machine that a reader of a number needs."""
    return Environment(
        machine=platform.machine(),
        cpu=cpu_name(),
        cpu_flags=sorted(cpu_flags()),
        cores=os.cpu_count() or 1,
        threads=threads,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
    )

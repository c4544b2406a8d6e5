"""PyTorch compiled by Inductor, with integer products where a plan rounds activations at run time."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any, ClassVar, cast

import torch
from torch import nn

from tersor.errors import RuntimeUnavailableError
from tersor.runtimes.eager import Eager
from tersor.runtimes.integer_linear import with_integer_layers
from tersor.runtimes.torch_storage import Stored

DYNAMIC = "int8-dynamic"
COMPILERS = {"darwin": "clang++", "win32": "cl"}


class Inductor(Eager):
    """The artifacts of `eager`, compiled at the first call of each new shape; needs a C++ compiler.

    Linear layers of dynamic plans run on `torch._int_mm`; all other weights in few bits are decoded when they are
    loaded. PyTorch's products of floats with weights of 4 and 8 bits are left aside: on a CPU they took many times as
    long as those in float32 (docs/runtimes.md).
    """

    name: ClassVar[str] = "inductor"
    formats: ClassVar[frozenset[str]] = Eager.formats | {DYNAMIC}

    def check_available(self) -> None:
        """Raises `RuntimeUnavailableError` if there is no compiler."""
        compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise RuntimeUnavailableError(
                f"target runtime {self.name!r} needs a C++ compiler, and {compiler!r} is not on the PATH; install one, "
                "e.g. apt-get install g++, or name another in the environment variable CXX"
            )

    def prepare(self, module: nn.Module, stored: Stored) -> nn.Module:
        """Puts integer layers in and compiles."""
        if stored.precision == DYNAMIC:
            module = with_integer_layers(module, stored.weights)
        compiled: Any = torch.compile(module)
        return cast("nn.Module", compiled)

"""Runtimes: where compressed models run. Each imports its package only when it is used.

Third parties add their own with an entry point in the group `tersor.runtimes`.
"""

from importlib.metadata import entry_points

from tersor.errors import ConfigError
from tersor.runtimes.base import Loaded, Runtime, Session
from tersor.runtimes.eager import Eager
from tersor.runtimes.inductor import Inductor
from tersor.runtimes.onnxruntime import OnnxRuntime
from tersor.runtimes.openvino import OpenVino

RUNTIMES: dict[str, type[Runtime]] = {runtime.name: runtime for runtime in (Eager, Inductor, OnnxRuntime, OpenVino)}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ConfigError: naming those that exist.
    """
    plugins = {point.name: point for point in entry_points(group="tersor.runtimes")}
    if name in RUNTIMES:
        return RUNTIMES[name]()
    if name in plugins:
        plugin: type[Runtime] = plugins[name].load()
        return plugin()
    raise ConfigError(f"Target.runtime: expected one of {sorted([*RUNTIMES, *plugins])}, got {name!r}")


__all__ = ["RUNTIMES", "Loaded", "Runtime", "Session", "get_runtime"]

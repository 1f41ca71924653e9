"""Programs that are copied into exported directories. They import nothing of jaxllm."""

import importlib.util
import pathlib
from types import ModuleType


def imported(path: pathlib.Path) -> ModuleType:
    """The module in a file, by whatever name; a new one each time."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

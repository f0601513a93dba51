"""With this folder on PYTHONPATH, every `python -m pipeline` knows `hornet_former_gf`, a HorNet of 5,116 weights.

It is registered with timm as the published ones are, when `pipeline.models` has been imported; all else runs as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any, ClassVar

OPTIONS = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8), "orders": (2, 3, 3, 3)}


def hornet_former_gf(pretrained: bool = False, **kwargs: Any) -> Any:
    """The smallest registered variant, smaller."""
    import timm

    return timm.create_model("hornet_nano_gf", pretrained, **OPTIONS, **kwargs)


def _register(_: Any) -> None:
    from timm.models import register_model

    register_model(hornet_former_gf)


def _name(sections: Any) -> None:
    sections.MODELS = (*sections.MODELS, hornet_former_gf.__name__)


class _Finder(importlib.abc.MetaPathFinder):
    """Calls a function of ours when a module has been executed."""

    after: ClassVar = {"pipeline.models": _register, "pipeline.config.sections": _name}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        then = self.after.pop(name, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())

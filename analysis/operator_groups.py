"""Compiled operators switched on and off by groups, to see what each is worth."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import kernels

_NAMES = {"linear": "linear layers", "attention": "attention", "self_attention": "attention",
          "layer_norm": "layer norms and GELU", "gelu": "layer norms and GELU"}
OTHERS = "other operators"
GROUPS = ("depthwise convolutions", "dense convolutions", *dict.fromkeys(_NAMES.values()), OTHERS)
_NO_OPERATORS = {"configure", "using", "status", "contextmanager", "nearest"}


class Selection:
    """Which operators of this process are compiled ones: all, none, or the groups last chosen."""

    def __init__(self, compiled: bool) -> None:
        kernels.configure("auto" if compiled else "stock")
        self.compiled = compiled
        self._chosen: frozenset[str] | None = None
        self._wrapped = False

    def choose(self, groups: Iterable[str] | None) -> None:
        """Take the compiled operators of these groups alone; None: all that ``compiled`` allows."""
        self._chosen = None if groups is None else frozenset(groups)
        if groups is not None and not self._wrapped:
            self._wrapped = True
            for name, function in inspect.getmembers(kernels, inspect.isfunction):
                if not name.startswith("_") and name not in _NO_OPERATORS:
                    setattr(kernels, name, self._wrap(name, function))
        kernels.configure("auto" if self.compiled and (self._chosen is None or OTHERS in self._chosen) else "stock")

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            if self._chosen is None:
                return function(*args, **kwargs)
            with kernels.using("auto" if _group(name, args, kwargs) in self._chosen else "stock"):
                return function(*args, **kwargs)

        return chosen


def _group(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if name == "depthwise_conv2d":
        return GROUPS[0]
    if name == "conv2d":
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        return GROUPS[1] if groups == 1 else GROUPS[0]
    return _NAMES.get(name, OTHERS)

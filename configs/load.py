"""Read a config: YAML files with ``_BASE_`` inheritance and ``-o`` overrides, checked against the schema."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs.schema import KEYS, TYPES, default_config
from errors import UserError, nearest, printable

MAX_BYTES = 256 << 10  # of one file
MAX_VALUES = 10_000  # in one file, names of keys included
MAX_FILES = 50  # of one config: itself and its bases, each time that it is named
MAX_NUMBER = 1 << 63
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> CfgNode:
    """Return the frozen tree of a YAML file (None: the defaults) with ``KEY=VALUE`` overrides.

    Raises UserError, naming file and key, for a file that cannot be read, an unknown key, a wrong type, or a value
    that the key does not take.
    """
    config = default_config()
    if path is not None:
        for count, (file, tree) in enumerate(_read_with_bases(Path(path), ()), 1):
            if count > MAX_FILES:
                raise UserError(f"{path}: its _BASE_ leads to more than {MAX_FILES} files; this is no config")
            _merge(config, tree, str(file))
    for override in overrides:
        _merge(config, _parse_override(override), f"-o {printable(override)}")
    if not config.NAME:
        config.NAME = Path(path).stem if path is not None else config.MODEL.NAME.replace("/", "_")
    if config.SCHEDULE.WARMUP_EPOCHS > config.TRAIN.EPOCHS:
        raise UserError(f"SCHEDULE.WARMUP_EPOCHS is {config.SCHEDULE.WARMUP_EPOCHS:g}, longer than the training: the "
                        "learning rate never reaches OPTIMIZER.LR; expected less than TRAIN.EPOCHS "
                        f"({config.TRAIN.EPOCHS}), for example {config.TRAIN.EPOCHS / 10:g}")
    for section, key in ((config, "OUTPUT"), (config.DATA, "ROOT")):
        section[key] = os.path.expanduser(section[key])
    config.freeze()
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf; MODEL.ARGS is one leaf."""
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and dotted != "MODEL.ARGS":
            yield from flatten(value, dotted + ".")
        else:
            yield dotted, value


def to_plain(value: Any) -> Any:
    """Return ``value`` with every node of it a plain dict, for constructors and for JSON."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list) else value


def dump_config(config: CfgNode) -> str:
    """Return the YAML text that ``load_config`` reads as the same tree."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset without duplicate keys, tags (``!!name``) and aliases (``*name``).

    Numbers are decimal, as YAML 1.2 has them: ``1e-3`` is one; ``010``, ``0x10``, ``1:0`` and dates are texts.
    """

    nodes = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(key, str):
                problem = f"found the key {_describe(key)}, expected a text"
            elif key in seen:
                problem = f"the key {_describe(key)} is there twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, problem = self.peek_event(), None
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not used in configs"
        elif event.tag is not None:
            problem = f"tags ({event.tag}) are not used in configs"
        elif self.nodes > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values; this is no config"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes texts that ``_Loader`` reads as texts."""


_YAML = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_YAML + "timestamp", _YAML + "int",
                                                                       _YAML + "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_EXPONENT = r"([eE][-+]?[0-9]+)?"
_FLOAT = rf"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?{_EXPONENT}|\.[0-9]+{_EXPONENT}|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
for _tag, _pattern in ((_YAML + "int", r"[-+]?(0|[1-9][0-9]*)$"), (_YAML + "float", _FLOAT)):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Dumper.add_implicit_resolver(_YAML + "float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UserError(f"{where}{line}: not valid YAML for a config: {printable(problem, 200)}") from None
    except (RecursionError, ValueError, LookupError) as error:
        raise UserError(f"{where}: not valid YAML for a config: {type(error).__name__}") from None
    for value in _walk(tree):
        if isinstance(value, int) and abs(value) >= MAX_NUMBER:
            raise UserError(f"{where}: found a whole number of {value.bit_length()} bits, expected at most 63")
    return tree


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (file, tree) of a config and its bases, bases first."""
    if path.resolve() in above:
        raise UserError(f"{path}: _BASE_ leads back to the file itself")
    tree = _parse_yaml(_read_text(path, above), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {_describe(tree)}, expected sections such as MODEL: and TRAIN:")
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base.isprintable() for base in bases):
        raise UserError(f"{path}: _BASE_ takes a path or a list of paths, found {_describe(bases)}")
    for base in bases:
        yield from _read_with_bases(path.parent / os.path.expanduser(base), (*above, path.resolve()))
    yield path, tree


def _read_text(path: Path, above: tuple[Path, ...]) -> str:
    named_by = f" (the _BASE_ of {above[-1].name})" if above else ""
    try:
        if path.is_dir():
            raise UserError(f"{path}{named_by}: a folder, expected a YAML file")
        if not path.is_file():
            siblings = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
            raise UserError(f"{path}{named_by}: no such config file{nearest(path.name, siblings)}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}{named_by}: larger than {MAX_BYTES} bytes; this is no config")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{printable(path, 300)}{named_by}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}{named_by}: not UTF-8 text; expected a YAML config") from None


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"-o {printable(override)}: expected KEY=VALUE, for example -o TRAIN.EPOCHS=3")
    default = KEYS.get(".".join(parts), (None,))[0]
    tree: Any = text  # of a text key, as it is typed
    if not isinstance(default, str):
        tree = _parse_yaml(text, f"-o {printable(override)}") if text.strip() else ""
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _merge(node: CfgNode, tree: Mapping[str, Any], where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in node:
            raise UserError(f"{where}: unknown key {printable(dotted)}{_nearest_keys(dotted, prefix, node)}")
        if dotted == "MODEL.ARGS":
            _merge_arguments(node[key], value, where)
        elif isinstance(node[key], CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {dotted} is a section, found {_describe(value)}, expected keys such as "
                                f"{dotted}.{next(iter(node[key]))}")
            _merge(node[key], value, where, dotted + ".")
        else:
            node[key] = _checked(dotted, node[key], value, where)


def _nearest_keys(dotted: str, prefix: str, node: CfgNode) -> str:
    """Return the tail of a message: the keys whose last part is that of ``dotted``, else the nearest ones."""
    same = [key for key in KEYS if key.split(".")[-1].lower() == dotted.split(".")[-1].lower()]
    if dotted in KEYS:
        return f"; in a file it is written {dotted.replace('.', ': {')}: ...}}"
    if same:
        return f" (nearest: {', '.join(same)})"
    return nearest(dotted, dict.fromkeys([*(f"{prefix}{name}" for name in node), *KEYS]))


def _merge_arguments(node: CfgNode, value: Any, where: str) -> None:
    """Merge constructor arguments, which the network's constructor checks."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: MODEL.ARGS takes constructor arguments by name, found {_describe(value)}")
    for key, argument in value.items():
        if isinstance(argument, dict):
            if not isinstance(node.get(key), CfgNode):
                node[key] = CfgNode(new_allowed=True)
            _merge_arguments(node[key], argument, where)
        else:
            node[key] = argument


def _checked(dotted: str, default: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the type of ``default``; raises UserError where it does not fit."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, str) and type(value) is int:
        value = str(value)  # NAME: 20240101
    allowed = TYPES.get(dotted, (type(default),))
    if type(value) not in allowed:
        expected = " or ".join(_TYPE_NAMES[kind] for kind in allowed)
        hint = "; put it in quotes" if str in allowed and not isinstance(value, (list, dict)) else ""
        raise UserError(f"{where}: {dotted} takes {expected}, found {_describe(value)}{hint}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{where}: {dotted} takes a number, found nan")
    holds, expected = KEYS[dotted][1]
    if not holds(value):
        choices = expected.removeprefix("one of ").split(", ") if expected.startswith("one of ") else []
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{where}: {dotted} is {_describe(value)}, expected {expected}{hint}")
    return value


def _walk(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _walk(child)


def _describe(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

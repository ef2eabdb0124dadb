"""Damaged and hostile configs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from fuzz_cases import TINY, Case, random_cases, strangers

from configs.load import flatten
from configs.schema import default_config

CANARY = "CANARY"  # in a config: the path of a file that appears where something was executed

_COMMAND = f"touch {CANARY}"
_TAGS = [
    f"!!python/object/apply:os.system ['{_COMMAND}']", f"!!python/object/new:os.system ['{_COMMAND}']",
    f"!!python/object/apply:subprocess.Popen [['touch', '{CANARY}']]",
    f"!!python/object/apply:eval [\"open('{CANARY}', 'w')\"]",
    "!!python/name:os.system", "!!python/module:os", "!!python/object:os._wrap_close {}",
    "!!python/object/new:type {args: [a, [], {}], state: !!python/name:os.system}",
    "!!python/tuple [1, 2]", "!!python/none", "!!python/bool true", "!!python/str a", "!!python/unicode a",
    "!!python/bytes YQ==", "!!python/int 3", "!!python/long 3", "!!python/float 3", "!!python/complex 1j",
    "!!python/list [1]", "!!python/dict {a: 1}", "!!binary YQ==", "!!binary '='", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!timestamp 2020-01-01", "!!timestamp x", "!!bool x", "!!int ''", "!!int x", "!!float ''",
    "!!null x", "!!map {}", "!!seq []", "!!str 3", "!own 3", "! 3", "!<tag:x> 3", "&a 3", "*a",
]
_TEXTS = ("a text", "''", "'\\0'", "-1", "0x" + "f" * 5000, "1:2:3" * 300)  # also what YAML 1.1 takes for numbers
_WRONG = [*_TEXTS, "[1, 2, 3]", "{a: 1}", "null", "true", "1e999", "-.inf", ".nan", "1" + "0" * 400, "[[[]]]"]


def config_cases(seed: int, rounds: int) -> Iterator[Case]:
    """Yield damaged and hostile YAML, and a value of another type for every key of the schema."""
    yield from random_cases("config", "config.yaml", TINY.encode(), rounds, seed)
    for tag in _TAGS:
        for place in (f"TRAIN: {{EPOCHS: {tag}}}", f"MODEL: {{ARGS: {{pool_size: {tag}}}}}"):
            yield _config(f"tag {tag.split()[0]}", _BASED + place, must_refuse=not tag.startswith("&"))
    for what, content in strangers().items():
        if what != "empty":  # which means the defaults
            yield _config(f"wrong type: {what}", content, must_refuse=True)
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'] * 9)}]\n" for i in range(9))
    lines = {
        "billion laughs": laughs, "merge": "TRAIN: {<<: {EPOCHS: 3}}", "duplicate key": "TRAIN: {EPOCHS: 1, EPOCHS: 2}",
        "duplicate section": "TRAIN: {EPOCHS: 1}\nTRAIN: {EPOCHS: 1}", "nested lists": "A: " + "[" * 50_000,
        "nested and closed": "MODEL: {ARGS: {a: " + "[" * 90_000 + "]" * 90_000 + "}}",
        "nested sections": "".join(" " * i + "a:\n" for i in range(600)), "two documents": TINY + "---\n" + TINY,
        "directive": "%YAML 9.9\n---\nTRAIN: {EPOCHS: 1}", "tab": "TRAIN:\n\tEPOCHS: 3", "NUL": "TRAIN: {EPOCHS: 3}\0",
        "thousands of keys": "".join(f"k{i}: 1\n" for i in range(25_000)), "long key": "k" * 200_000 + ": 1",
        "key of a list": "? [a, b]\n: 1", "number as a key": "3: 4", "keys of one place": '"TRAIN\\nx\\e[31m": 1',
        "too large": "# " + "x" * (1 << 20), "base of itself": "_BASE_: config.yaml",
        "base of none": "_BASE_: nowhere.yaml",
        "base in a ring": "_BASE_: ring.yaml", "base upon base": "_BASE_: [" + ", ".join(["b0.yaml"] * 10) + "]",
        "base a folder": "_BASE_: /", "base a device": "_BASE_: /dev/zero", "base with NUL": '_BASE_: "a\\0b"',
        "base too long": "_BASE_: " + "n" * 5000, "base a number": "_BASE_: 5", "base of numbers": "_BASE_: [5]",
        "constructor": _BASED + "MODEL: {ARGS: {__class__: 3}}",
        "argument of none": _BASED + "MODEL: {ARGS: {num_classes: 3}}",
    }
    ring = {"ring.yaml": b"_BASE_: config.yaml"}
    ring |= {f"b{i}.yaml": f"_BASE_: [{', '.join([f'b{i + 1}.yaml'] * 10)}]".encode() for i in range(9)}
    ring["b9.yaml"] = b"TRAIN: {EPOCHS: 1}"
    for what, content in lines.items():
        yield _config(what, content if "base" not in what else TINY + content, True, ring)
    for what, content in {"BOM": b"\xef\xbb\xbf" + TINY.encode(), "CRLF": TINY.replace("\n", "\r\n").encode()}.items():
        yield _config(what, content)
    for what in ("utf-16", "utf-32"):
        yield _config(what, TINY.encode(what), must_refuse=True)
    rng = np.random.default_rng(seed)
    for key, value in flatten(default_config()):
        right = {str: _TEXTS, bool: ("true",), int: ("-1",), float: ("-1",), list: ("[1, 2, 3]",)}
        never = ("1e999",) if key == "TRAIN.CHECKPOINT_MINUTES" else ()  # an infinite time is one
        wrong = [text for text in _WRONG if text not in right.get(type(value), ("{a: 1}",)) + never]
        for index in rng.choice(len(wrong), 3 * rounds if rounds < 3 else len(wrong), replace=False):
            section, *rest = key.split(".")
            line = f"{_BASED}{section}: " + "".join(f"{{{part}: " for part in rest) + wrong[index] + "}" * len(rest)
            yield _config(f"wrong type of {key}", line, must_refuse=True)


_BASED = "_BASE_: base.yaml\n"


def _config(damage: str, content: str | bytes, must_refuse: bool = False, more: dict[str, bytes] | None = None) -> Case:
    raw = content.encode() if isinstance(content, str) else content
    return Case("config", damage, {"config.yaml": raw, "base.yaml": TINY.encode(), **(more or {})}, must_refuse)

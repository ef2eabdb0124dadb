"""Damaged and hostile configs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fuzz_cases import damaged, strangers

from configs.load import flatten
from configs.schema import default_config

CANARY = "canary"  # the file that appears in the working directory where something was executed
TINY = """
MODEL:
  NAME: poolformer_s12
  ARGS: {depths: [1, 1], embed_dims: [8, 16]}
DATA: {NAME: digits, IMAGE_SIZE: 32, BATCH_SIZE: 64, EVAL_BATCH_SIZE: 360, HOLDOUT: 180, WORKERS: 0, DOWNLOAD: false}
TRAIN: {EPOCHS: 1, MAX_STEPS: 2, LOG_EVERY: 1}
"""

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
_BASED = "_BASE_: base.yaml\n"


def write_bases(folder: Path) -> None:
    """Write the files that the cases name as their ``_BASE_``."""
    files = {"base": TINY, "ring": "_BASE_: config.yaml", "b9": "TRAIN: {EPOCHS: 1}"}
    files |= {f"b{i}": f"_BASE_: [{', '.join([f'b{i + 1}.yaml'] * 10)}]" for i in range(9)}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def config_cases(seed: int, rounds: int) -> Iterator[tuple[str, str | bytes, bool]]:
    """Yield (damage, content, whether it must be refused): hostile YAML, and wrong values for every key of the schema.

    ``rounds`` times as many random ones.
    """
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield from ((damage, content, False) for damage, content in damaged(TINY.encode(), rng))
    for tag in _TAGS:
        for place in (f"TRAIN: {{EPOCHS: {tag}}}", f"MODEL: {{ARGS: {{pool_size: {tag}}}}}"):
            yield f"tag {tag.split()[0]}", _BASED + place, not tag.startswith("&")
    for what, content in strangers().items():
        if what != "empty":  # which means the defaults
            yield f"wrong type: {what}", content, True
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['lol'] * 9)}]\n" for i in range(9))
    lines = {
        "billion laughs": laughs, "merge": "TRAIN: {<<: {EPOCHS: 3}}",
        "duplicate section": "TRAIN: {EPOCHS: 1}\nTRAIN: {EPOCHS: 1}",
        "nested and closed": "MODEL: {ARGS: {a: " + "[" * 90_000 + "]" * 90_000 + "}}",
        "nested sections": "".join(" " * i + "a:\n" for i in range(600)), "two documents": TINY + "---\n" + TINY,
        "directive": "%YAML 9.9\n---\nTRAIN: {EPOCHS: 1}", "tab": "TRAIN:\n\tEPOCHS: 3", "NUL": "TRAIN: {EPOCHS: 3}\0",
        "thousands of keys": "".join(f"k{i}: 1\n" for i in range(25_000)), "long key": "k" * 200_000 + ": 1",
        "key of a list": "? [a, b]\n: 1", "keys of one place": '"TRAIN\\nx\\e[31m": 1',
        "base in a ring": "_BASE_: ring.yaml", "base upon base": "_BASE_: [" + ", ".join(["b0.yaml"] * 10) + "]",
        "base a folder": "_BASE_: /", "base a device": "_BASE_: /dev/zero", "base with NUL": '_BASE_: "a\\0b"',
        "base too long": "_BASE_: " + "n" * 5000, "base of numbers": "_BASE_: [5]",
        "constructor": _BASED + "MODEL: {ARGS: {__class__: 3}}",
        "argument of none": _BASED + "MODEL: {ARGS: {num_classes: 3}}",
    }
    for what, content in lines.items():
        yield what, content if "base" not in what else TINY + content, True
    for what, content in {"BOM": b"\xef\xbb\xbf" + TINY.encode(), "CRLF": TINY.replace("\n", "\r\n").encode()}.items():
        yield what, content, False
    for what in ("utf-16", "utf-32"):
        yield what, TINY.encode(what), True
    for key, value in flatten(default_config()):
        right = {str: _TEXTS, bool: ("true",), int: ("-1",), float: ("-1",), list: ("[1, 2, 3]",)}
        never = ("1e999",) if key == "TRAIN.CHECKPOINT_MINUTES" else ()  # an infinite time is one
        wrong = [text for text in _WRONG if text not in right.get(type(value), ("{a: 1}",)) + never]
        for index in rng.choice(len(wrong), 3 * rounds if rounds < 3 else len(wrong), replace=False):
            section, *rest = key.split(".")
            line = f"{_BASED}{section}: " + "".join(f"{{{part}: " for part in rest) + wrong[index] + "}" * len(rest)
            yield f"wrong type of {key}", line, True

"""Damaged and hostile files: refused in one sentence, or read for what they are, in bounded memory and time.

FUZZ_ROUNDS=8 gives eight times as many random inputs. Weights and archives have tests of their own.
"""

import os
import re
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cifar_files
import numpy as np
import pytest
import yaml
from fuzz_cases import damaged, encoded, png, strangers, wrong_states
from safetensors.numpy import save_file

from configs.load import flatten, load_config
from configs.schema import default_config
from datasets import cifar
from datasets.files import read_image
from engine import checkpoint
from engine.model import build_model
from engine.run import RunFolder
from engine.state import TrainingProgress, TrainingState
from engine.weights import save_weights
from errors import UserError
from processes import call, overrides

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


SEED, ROUNDS = 11, int(os.environ.get("FUZZ_ROUNDS", "1"))
IMAGES = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
pytestmark = pytest.mark.timeout(120 * ROUNDS)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Leave a gigabyte of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(action: Callable[[], object], *names: str) -> str:
    """Return the message of the UserError of ``action``: a short printable line with one of ``names``; "" for none."""
    try:
        action()
    except UserError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1500 and any(name in text for name in names), text
        return text
    return ""


def test_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message names the file, or a word in it; a config that is read has the values that the file holds."""
    monkeypatch.chdir(tmp_path)
    write_bases(tmp_path)
    path = tmp_path / "config.yaml"
    for damage, text, must_refuse in config_cases(SEED, ROUNDS):
        content = text.encode() if isinstance(text, str) else text
        path.write_bytes(content)
        names = re.findall(r"\w{5,}", content.decode("latin1"))
        refused = refusal(lambda: build_model(load_config(path)), path.name, damage.rpartition(" ")[2], *names)
        assert refused or not must_refuse, (damage, content[:200])
        if not refused and content != TINY.encode():
            config, tree = dict(flatten(load_config(path))), dict(flatten(yaml.safe_load(content) or {}))
            tree.pop("_BASE_", None)
            assert all(config[key] == tree[key] or float(config[key]) == float(tree[key])
                       for key in tree if key != "MODEL.ARGS"), (damage, content[:200])
        assert not (tmp_path / CANARY).exists(), damage


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images(kind: str, tmp_path: Path) -> None:
    """Refused, or an image; a PNG, which has checksums, is whole, and nothing cut short passes."""
    whole, rng, refused = encoded(kind), np.random.default_rng(SEED), 0
    path = tmp_path / f"x.{kind}"
    path.write_bytes(whole)
    expected = read_image(path)
    for damage, content in (one for _ in range(10 * ROUNDS) for one in damaged(whole, rng)):
        path.write_bytes(content)
        try:
            found = read_image(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert found.dtype == np.uint8 and found.shape[2:] == (3,)
        assert damage != "truncated" or whole == content or np.array_equal(found, expected)
        assert kind != "PNG" or np.array_equal(found, expected)
    assert refused > 15


def test_image_bombs_and_files_that_are_no_images(tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + packer.flush()
    bombs = {
        "900 million pixels in 100 KB": png(30_000, 30_000, rows, 1, 0),
        "sides of 2^31": png(2**31 - 1, 2**31 - 1, rows),
        "sides in the header alone": png(9999, 9999, b""), "no pixels": png(0, 0, b""),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }
    path = tmp_path / "x.png"
    for what, content in (bombs | strangers()).items():
        path.write_bytes(content)
        assert refusal(lambda: read_image(path), path.name) or what == "png", what


def test_damaged_batches() -> None:
    """A loose batch has no checksum: a flipped bit is refused, or it is a wrong pixel, label or name."""
    whole, rng, refused = cifar_files.batch(5), np.random.default_rng(SEED), 0
    for damage, content in (one for _ in range(15) for one in damaged(whole, rng)):
        try:
            images, labels = cifar._read_batch(content, cifar.RELEASES["cifar10"], 20, "batch", "remedy")
        except UserError:
            refused += 1
            continue
        assert damage != "truncated" and images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (20,) and 0 <= labels.min() <= labels.max() < 10
    assert 30 < refused < 105


def test_forged_checkpoints(tmp_path: Path) -> None:
    """Their checksums are right: the run is refused, or starts from the beginning."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    config, run = load_config(tmp_path / "tiny.yaml"), RunFolder(tmp_path)
    state = TrainingState(config)
    state.progress.global_step = 2
    saved = checkpoint.load_checkpoint(state.save(run))
    model, progress = saved.parts["model"], saved.progress

    def restored() -> TrainingProgress:
        fresh = TrainingState(config)
        fresh.restore(run)
        return fresh.progress

    assert restored().global_step == 2
    forged = [({**saved.parts, "model": wrong}, progress) for reason, wrong in wrong_states(model)
              if "finite" not in reason and "int64" not in reason]
    forged += [({**saved.parts, "optimizer": {key: np.zeros(3, "f4")}}, progress)
               for key in ("head.weight/moment1_0", "nowhere/moment1_0", "")]
    wrong = {"epoch": [-1, "1"], "sums": [[1], 3], "best_loss": [1e999], "global_step": [10**400], "scaler": [[]],
             "__class__": [1], "step": [True]}
    forged += [(saved.parts, value) for value in (
        [], 5, None, *({**progress, key: value} for key, values in wrong.items() for value in values))]
    for parts, value in forged:
        checkpoint.save_checkpoint(tmp_path / "checkpoints", 2, parts, value, 1)
        assert refusal(restored, saved.path.name) or restored().global_step == 0, value
    arrays = {f"model.{name}": array for name, array in model.items()}
    for text in ("[" * 100_000, "{"):
        save_file(arrays, saved.path, {"format": "checkpoint", "progress": text,
                                       "sha256": checkpoint._digest(arrays, text)})
        assert restored().global_step == 0


@pytest.mark.parametrize("kind", ["config", "weights", "archive", "image"])
def test_commands_end_with_the_readers_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(strangers()["noise"])
    (tmp_path / "good.yaml").write_text(TINY)
    good, weights = tmp_path / "good.yaml", tmp_path / "weights.pdparams"
    save_weights(weights, build_model(load_config(good)).state_dict())
    done = call(*{
        "config": ("eval", "-c", path, "-w", weights), "weights": ("eval", "-c", good, "-w", path),
        "archive": ("eval", "-c", good, "-w", weights, *overrides("DATA.NAME=cifar10", f"DATA.ROOT={path}")),
        "image": ("predict", "-c", good, "-w", weights, path),
    }[kind], code=2)
    assert path.name in done.stderr, done.stderr

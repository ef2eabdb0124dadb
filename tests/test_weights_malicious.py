"""Pickles that would run something: refused by name, wherever they stand, and nothing has run."""

from __future__ import annotations

import collections
import copyreg
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pickled import as_legacy, as_legacy_keys, as_legacy_system, as_legacy_version, as_paddle, as_zip, name, text

from engine.weights import read_weights
from errors import UserError

DATA = Path(__file__).parent / "data" / "weights"


class Reduced:
    """An object whose pickle calls `function` with `arguments`."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.called


def by_numpy_load(command: str) -> bytes:
    """A file beside the weights, read by numpy with pickles allowed."""
    beside = command.split()[-1] + ".npy"
    np.save(beside, np.array([Reduced(os.system, command)], dtype=object), allow_pickle=True)
    return name("numpy", "load") + text(beside) + b"N\x88\x87R"


def inside(command: str) -> bytes:
    """Push a whole pickle as bytes."""
    inner = b"\x80\x02" + name("os", "system") + text(command) + b"\x85R."
    return b"C" + bytes([len(inner)]) + inner


STATE = b"}" + text("__setstate__") + name("os", "system") + b"sb"
# Each takes the command of the canary and gives the opcodes of an object, without PROTO and STOP; then the name
# that the refusal must tell, and whether Python's own unpickler falls for it on this machine.
ATTACKS: dict[str, tuple[Callable[[str], bytes], str, bool]] = {
    "reduce": (lambda command: name("os", "system") + text(command) + b"\x85R", "os.system", True),
    "stack global": (lambda command: text("posix") + text("system") + b"\x93" + text(command) + b"\x85R",
                     "posix.system", True),
    "dotted attribute": (lambda command: text("shutil") + text("os.system") + b"\x93" + text(command) + b"\x85R",
                         "shutil.os.system", True),
    "eval": (lambda command: name("builtins", "eval") + text(f"__import__('os').system({command!r})") + b"\x85R",
             "builtins.eval", True),
    "chain of getattr": (
        lambda command: name("builtins", "getattr") + name("builtins", "__import__") + text("os") + b"\x85R"
        + text("system") + b"\x86R" + text(command) + b"\x85R", "builtins.getattr", True),
    # An allowed class gets ``__setstate__`` from its first state, and the second one calls it.
    "build": (lambda command: name("argparse", "Namespace") + b")\x81" + STATE + text(command) + b"b",
              "os.system", True),
    "reconstructor": (
        lambda command: name("copyreg", "_reconstructor") + name("argparse", "Namespace") + name("builtins", "object")
        + b"N\x87R" + STATE + text(command) + b"b", "copyreg._reconstructor", True),
    "INST": (lambda command: b"(" + text(command) + b"ios\nsystem\n", "os.system", True),
    "OBJ": (lambda command: b"(" + name("os", "system") + text(command) + b"o", "os.system", True),
    "extension": (lambda command: b"\x82\xf0" + text(command) + b"\x85R", "EXT1", True),
    "object array": (lambda command: pickle.dumps(np.array([Reduced(os.system, command)], dtype=object), 4)[2:-1],
                     "numpy.dtype('O8')", True),
    "numpy.load": (by_numpy_load, "numpy.load", True),
    "pickle in a pickle": (lambda command: name("pickle", "loads") + inside(command) + b"\x85R", "pickle.loads", True),
    # ``Popen.__new__`` alone would do nothing; its state would.
    "NEWOBJ": (lambda command: name("subprocess", "Popen") + b"q\x05)\x81}" + text("args") + text(command) + b"sb",
               "subprocess.Popen", False),
    "of Windows": (lambda command: name("nt", "system") + text(command) + b"\x85R", "nt.system", False),
    # What plain pickling of a tensor gives: PyTorch reads the bytes by a ``torch.load`` of its own.
    "torch.load": (lambda command: name("torch.storage", "_load_from_bytes") + inside(command) + b"\x85R",
                   "torch.storage._load_from_bytes", False),
}


def in_storage(payload: bytes) -> bytes:
    return as_zip(b"}" + text("w") + b"(" + text("storage") + payload + text("0") + text("cpu") + b"K\x01tQs")


PLACES = [as_zip, as_legacy, as_legacy_version, as_legacy_system, as_legacy_keys, as_paddle, in_storage]


@pytest.fixture
def extension() -> None:
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack: str, place: Callable, tmp_path: Path, extension: None) -> None:
    canary = tmp_path / "canary"
    make, refused, works = ATTACKS[attack]
    payload = make(f"touch {canary}")
    (tmp_path / "weights.pth").write_bytes(place(payload))
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "weights.pth")
    assert refused in str(error.value) and "weights.pth is refused and nothing of it was run" in str(error.value)
    assert not canary.exists()
    if works and place is as_paddle:  # the attack is one: Python's own unpickler runs it
        pickle.loads(as_paddle(payload))
        assert canary.exists()


def test_references_outside_a_paddle_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(as_paddle(b"(" + text("storage") + b"tQ"))
    with pytest.raises(UserError, match="refers to objects outside itself"):
        read_weights(tmp_path / "w")


def test_whole_models_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"names torch\.nn\.modules\.linear\.Linear.*save only the state_dict"):
        read_weights(DATA / "whole_model.pt")


def test_the_budget_of_bytes_leaves_real_files_alone(tmp_path: Path) -> None:
    """Protocol 2 keeps arrays as encoded text; forty of them stay within the file's bytes."""
    state = collections.OrderedDict((f"w{index}", np.full(50, 200 + index, np.uint8)) for index in range(40))
    (tmp_path / "w").write_bytes(pickle.dumps(state, 2))
    assert sum(array.sum() for array in read_weights(tmp_path / "w").arrays.values()) == sum(
        50 * (200 + index) for index in range(40))

"""Damaged and hostile files through the commands: refused in one sentence, or read for what they are."""

from __future__ import annotations

import collections
from pathlib import Path

import cifar_files
import fuzz_cases
import fuzzing
import numpy as np
import pytest

from datasets import cifar
from datasets.files import read_image
from errors import UserError
from processes import ROOT, overrides, tool

SEED = 11  # not that of the long form
SAMPLE = 14  # every so many-th input in the quick form


@pytest.mark.parametrize("kind", fuzz_cases.IMAGES)
def test_damaged_images(kind: str, tmp_path: Path) -> None:
    """Refused, or an image; a PNG, which has checksums, is whole, and nothing cut short passes."""
    whole, rng, refused = fuzz_cases.encoded(kind), np.random.default_rng(SEED), 0
    path = tmp_path / f"x.{kind}"
    path.write_bytes(whole)
    expected = read_image(path)
    for damage, content in (one for _ in range(10) for one in fuzz_cases.damaged(whole, rng)):
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


def test_damaged_batches() -> None:
    """A loose batch has no checksum: a flipped bit is refused, or it is a wrong pixel, label or name."""
    whole, rng, refused = cifar_files.batch(5), np.random.default_rng(SEED), 0
    for damage, content in (one for _ in range(15) for one in fuzz_cases.damaged(whole, rng)):
        try:
            images, labels = cifar._read_batch(content, cifar.RELEASES["cifar10"], 20, "batch", "remedy")
        except UserError:
            refused += 1
            continue
        assert damage != "truncated" and images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
        assert labels.shape == (20,) and 0 <= labels.min() <= labels.max() < 10
    assert 30 < refused < 105


def test_a_sample_of_inputs_ends_well(tmp_path: Path) -> None:
    fuzzing.prepare(tmp_path, trained=False)
    outcomes = fuzzing.run_cases(tmp_path, fuzzing.all_cases(tmp_path, SEED, 1)[::SAMPLE])
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert len({outcome.kind for outcome in outcomes}) > 12
    assert sum(outcome.verdict == "refused" for outcome in outcomes) > 30


@pytest.mark.slow
def test_every_input_ends_well(tmp_path: Path) -> None:
    fuzzing.prepare(tmp_path)
    cases = fuzzing.all_cases(tmp_path, SEED, 1)
    outcomes = fuzzing.run_cases(tmp_path, cases)
    print(fuzzing.table(outcomes))
    assert [outcome for outcome in outcomes if not outcome.good] == []
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    assert len(outcomes) >= 500 and counts["refused"] >= 500

    # One input of each command in a process of its own, as a user gives it.
    for kind in ("config", "weights.pdparams", "zip.pth", "cifar-10-python.tar.gz", "PNG image"):
        case = next(case for case in cases if case.kind == kind and case.damage in ("truncated", "wrong type: noise"))
        folder = tmp_path / f"own_{kind}"
        folder.mkdir()
        for name, content in case.files.items():
            (folder / name).write_bytes(content if kind != "config" else content[:60] + b"\xff")
        command, given = fuzzing.arguments(case, tmp_path, folder)
        done = tool(command, *given)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1 and next(iter(case.files)) in done.stderr

    forged = next(case for case in cases if case.damage == "forged: wrong progress")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(next(iter(forged.files.values())))
    done = tool("train", "-c", tmp_path / "good.yaml", *overrides(f"OUTPUT={tmp_path}", "NAME=run"), "--resume",
                cwd=ROOT)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2)
    assert str(newest) in done.stdout + done.stderr

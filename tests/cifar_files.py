"""Small CIFAR-10 archives and folders of any content, for the tests."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets import cifar

FOLDER = "cifar-10-batches-py"
NAMES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
IMAGES = 20


def change_release(monkeypatch: pytest.MonkeyPatch, name: str = "cifar10", **fields: object) -> None:
    """Change what is expected of a release, such as the images of a batch, so that whole archives are small."""
    monkeypatch.setitem(cifar.RELEASES, name, replace(cifar.RELEASES[name], **fields))


def arrays(seed: int) -> tuple[np.ndarray, list[int]]:
    """Return pixels uint8 ``[20, 3072]`` and labels of one batch."""
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, 3072), dtype=np.uint8)
    return pixels, [(seed + i) % 10 for i in range(IMAGES)]


def batch(seed: int, protocol: int = 2, **changes: object) -> bytes:
    """Return one pickled batch, with other values for some of its keys."""
    pixels, labels = arrays(seed)
    content = {"batch_label": f"batch {seed}", "labels": labels, "data": pixels, "filenames": ["a.png"] * IMAGES}
    content.update(changes)
    return pickle.dumps({key.encode(): value for key, value in content.items() if value is not None}, protocol)


def members(changes: dict[str, bytes | None] | None = None) -> dict[str, bytes]:
    """Return the files of an archive by name; ``changes`` replace, add, or (None) remove."""
    names = [*NAMES["train"], *NAMES["test"]]
    files: dict[str, bytes | None] = {name: batch(seed) for seed, name in enumerate(names)}
    files = {"batches.meta": pickle.dumps({b"num_vis": 3072}, 2), **files, **(changes or {})}
    return {name: content for name, content in files.items() if content is not None}


def expected(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images ``[N, 32, 32, 3]`` and labels ``[N]`` that an unchanged archive holds."""
    seeds = range(5) if split == "train" else [5]
    parts = [arrays(seed) for seed in seeds]
    pixels = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels, np.concatenate([part[1] for part in parts])


def write_folder(folder: Path, changes: dict[str, bytes | None] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members(changes).items():
        (folder / name).write_bytes(content)


def write_archive(
    path: Path,
    changes: dict[str, bytes | None] | None = None,
    before: Callable[[tarfile.TarFile], None] = lambda archive: None,
) -> None:
    """Write a tar.gz; ``before`` adds members of its own ahead of the files."""
    pack(path, {f"{FOLDER}/{name}": content for name, content in members(changes).items()}, before)


def pack(path: Path, files: dict[str, bytes], before: Callable[[tarfile.TarFile], None] = lambda archive: None) -> None:
    """Write a tar or, by any other name, a tar.gz of files by name."""
    packed = path.open("wb") if path.suffix == ".tar" else gzip.GzipFile(path, "wb", compresslevel=1, mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w") as archive:
        before(archive)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

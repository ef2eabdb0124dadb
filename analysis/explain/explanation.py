"""What an explanation is: maps over an image, one for each class explained, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.fileio import write_atomically


@dataclass(frozen=True)
class Explanation:
    """One image explained by one method.

    ``image`` is uint8 ``[H, W, 3]`` at the network's size; ``classes`` are the predicted class and, where it is known
    and another, the true one (``label``); ``maps`` ``[len(classes), H, W]`` say for each pixel how much it speaks for
    the class, in the method's own unit; ``probabilities`` ``[num_classes]`` are the network's; ``arrays`` are what the
    method gives beyond that.
    """

    method: str
    image: np.ndarray
    classes: tuple[int, ...]
    maps: np.ndarray
    probabilities: np.ndarray
    label: int | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def predicted(self) -> int:
        """Return the predicted class."""
        return self.classes[0]

    def map_of(self, index: int) -> np.ndarray:
        """Return the map ``[H, W]`` of one of ``classes``."""
        return self.maps[self.classes.index(index)]

    def save(self, path: Path) -> Path:
        """Write all of it as ``.npz``, atomically: the fields' names, and those of ``arrays``; -1 is no label."""
        arrays = {"image": self.image, "classes": np.array(self.classes), "maps": self.maps.astype(np.float32),
                  "probabilities": self.probabilities, "label": np.array(-1 if self.label is None else self.label),
                  **self.arrays}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)

        write_atomically(path, write)
        return path

"""Fourier analysis of feature maps: how much of high frequencies each block of a network keeps.

For a map x ``[C, H, W]`` of a block, F its two-dimensional discrete Fourier transform over H and W,

    L(u, v) = mean over images and channels of log(|F(u, v)| + 1e-6)
    Δ(f)    = L(f H / 2, f W / 2) - L(0, 0),   f from 0 to 1 in units of π per pixel of the map

L is the log amplitude spectrum, Δ the relative log amplitude along the diagonal (Park and Kim, "How Do Vision
Transformers Work?", ICLR 2022, section 3, and their code xxxnell/how-do-vits-work; figure 1 of the iFormer paper).
Δ is 0 at frequency 0; the higher it is at f = 1, the more edges and texture are in the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from paddle import nn
from yacs.config import CfgNode

from analysis.features import find_blocks, watching
from analysis.figures import save_figure
from datasets.transforms import build_eval_transforms
from errors import UserError
from utils.fileio import write_json

EPSILON = 1e-6


@dataclass
class BlockSpectrum:
    """The log amplitude spectrum L of one block's maps; ``stage`` numbers the sizes of maps in a network from 1."""

    name: str
    stage: int
    total: np.ndarray  # float64 [H, W]: sum over images and channels of log(|F| + epsilon)
    maps: int = 0

    @property
    def log_amplitude(self) -> np.ndarray:
        """Return L, float64 ``[H, W]``."""
        return self.total / self.maps

    @property
    def relative(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the frequencies f, in units of π, and Δ at them; a map of one pixel has f = 0 alone."""
        height, width = self.total.shape
        steps = min(height, width) // 2
        positions = np.arange(steps + 1) / max(steps, 1)
        rows, columns = (np.rint(positions * (side // 2)).astype(int) for side in (height, width))
        spectrum = self.log_amplitude
        return positions * (min(height, width) // 2 * 2 / min(height, width)), spectrum[rows, columns] - spectrum[0, 0]


def log_amplitude(maps: np.ndarray) -> np.ndarray:
    """Return log(|F| + 1e-6) of maps ``[..., H, W]``, frequency 0 at ``[..., 0, 0]``, as float64."""
    return np.log(np.abs(np.fft.fft2(maps.astype(np.float64))) + EPSILON)


@dataclass
class ModelSpectrum:
    """A spectrum for each block of a network, in its order."""

    title: str
    blocks: list[BlockSpectrum] = field(default_factory=list)

    def add(self, name: str, maps: paddle.Tensor, output: object = None) -> None:
        """Add the maps ``[B, C, H, W]`` that a block outputs."""
        spectrum = log_amplitude(maps.numpy())
        known = next((block for block in self.blocks if block.name == name), None)
        if known is None:
            sizes = list(dict.fromkeys([block.total.shape for block in self.blocks] + [spectrum.shape[-2:]]))
            known = BlockSpectrum(name, 1 + sizes.index(spectrum.shape[-2:]), np.zeros(spectrum.shape[-2:]))
            self.blocks.append(known)
        known.total += spectrum.sum((0, 1))
        known.maps += spectrum.shape[0] * spectrum.shape[1]

    @property
    def shown(self) -> list[BlockSpectrum]:
        """Return the blocks whose spectra are drawn: all up to six, else the last of each stage."""
        return self.blocks if len(self.blocks) <= 6 else list({block.stage: block for block in self.blocks}.values())

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a block for a table: name, stage, map, Δ at the frequencies f."""
        return [{"block": spectrum.name, "stage": spectrum.stage, "map": list(spectrum.total.shape),
                 "frequencies": [round(float(f), 4) for f in spectrum.relative[0]],
                 "relative_log_amplitude": [round(float(value), 4) for value in spectrum.relative[1]]}
                for spectrum in self.blocks]


@paddle.no_grad()
def analyse(config: CfgNode, model: nn.Layer, images: Sequence[np.ndarray], title: str = "", layers: str = "",
            batch_size: int = 64, advance: Callable[[int], None] = lambda images: None) -> ModelSpectrum:
    """Return the spectra of a network's blocks over images, uint8 ``[H, W, 3]`` each, transformed as in evaluation.

    ``layers`` names other layers than the blocks (a regular expression over whole names). Raises UserError where it
    matches none, or where none of the layers outputs a map.
    """
    model.eval()
    names = find_blocks(model, layers)
    result = ModelSpectrum(title or config.NAME)
    transform, rng = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE), np.random.default_rng(0)
    with watching(model, names, result.add):
        for start in range(0, len(images), batch_size):
            batch = np.stack([transform(image, rng) for image in images[start : start + batch_size]])
            model(paddle.to_tensor(batch))
            advance(len(batch))
    if not result.blocks:
        raise UserError(f"{', '.join(names[:4])}: none of these layers of {title} outputs a map")
    return result


def draw_spectra(models: Sequence[ModelSpectrum], path: Path) -> Path:
    """Write the figure: for each network the spectra of its stages and Δ against frequency, then Δ against depth."""
    columns = max(len(model.shown) for model in models)
    width, height = 1.4 * columns + 4.6, 2.0 * len(models) + 2.9  # inches, as are all margins below
    figure = Figure(figsize=(width, height))
    top = GridSpec(len(models), columns + 2, figure, left=0.85 / width, right=1 - 0.2 / width, top=1 - 0.5 / height,
                   bottom=3.05 / height, wspace=0.3, hspace=0.75, width_ratios=[1] * columns + [0.07, 2.0])
    bottom = GridSpec(1, 1, figure, left=0.85 / width, right=1 - 0.2 / width, top=2.3 / height, bottom=0.5 / height)
    for row, model in enumerate(models):
        _draw_spectra_of(figure, top, row, model)
        axes = figure.add_subplot(top[row, columns + 1])
        box = axes.get_position()
        axes.set_position((box.x0 + 0.75 / width, box.y0, box.width - 0.75 / width, box.height))
        _draw_frequencies(axes, model)
    _draw_depth(figure.add_subplot(bottom[0]), models)
    return save_figure(figure, path)


def save_spectra(models: Sequence[ModelSpectrum], path: Path) -> Path:
    """Write the numbers behind the figure as JSON."""
    write_json(path, {model.title: model.rows() for model in models})
    return path


def _draw_spectra_of(figure: Figure, grid: GridSpec, row: int, model: ModelSpectrum) -> None:
    relative = [np.fft.fftshift(block.log_amplitude - block.log_amplitude[0, 0]) for block in model.shown]
    low = min(values.min() for values in relative)
    for column, (block, values) in enumerate(zip(model.shown, relative, strict=True)):
        axes = figure.add_subplot(grid[row, column])
        picture = axes.imshow(values, cmap="magma", vmin=low, vmax=0, extent=(-1, 1, -1, 1))
        axes.set_title(f"{_short(block.name)}\n{values.shape[0]}×{values.shape[1]}", fontsize=8)
        axes.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1] if column == 0 else [])
        axes.tick_params(labelsize=7)
        axes.set_xlabel("frequency in π", fontsize=8)
        if column == 0:
            axes.set_ylabel(f"{_short(model.title)}\nfrequency in π", fontsize=8)
    bar = figure.colorbar(picture, cax=figure.add_subplot(grid[row, grid.ncols - 2]))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("Δ log amplitude", fontsize=8)


def _draw_frequencies(axes: Axes, model: ModelSpectrum) -> None:
    count = len(model.blocks)
    for index, block in enumerate(model.blocks):
        frequencies, values = block.relative
        if len(values) > 1:
            axes.plot(frequencies, values, color=colormaps["viridis"](0.9 * index / max(count - 1, 1)), linewidth=1.2,
                      marker="." if len(values) < 10 else None)
    axes.axhline(0, color="0.6", linewidth=0.6)
    axes.set_title("first block dark, last light", fontsize=8)
    axes.set_xlabel("frequency in π, diagonal", fontsize=8)
    axes.set_ylabel("Δ log amplitude", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _draw_depth(axes: Axes, models: Sequence[ModelSpectrum]) -> None:
    for number, model in enumerate(models):
        label, last = model.title, max(len(model.blocks) - 1, 1)
        for stage in dict.fromkeys(block.stage for block in model.blocks):
            points = [(index / last, block.relative[1][-1]) for index, block in enumerate(model.blocks)
                      if block.stage == stage and min(block.total.shape) > 1]
            if points:
                axes.plot(*zip(*points, strict=True), f"C{number}o-", markersize=3.5, label=label)
                label = None  # one entry of the legend for all stages
    axes.set_xlabel("depth: 0 the first block, 1 the last; a line for each size of map, maps of one pixel left out",
                    fontsize=8)
    axes.set_ylabel("Δ log amplitude at the\nhighest frequency of the map", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"…{name[1 - length:]}"

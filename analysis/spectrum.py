"""Fourier analysis of feature maps: how much of high frequencies each block of a network keeps.

For a map x ``[C, H, W]`` of a block, F its two-dimensional discrete Fourier transform over H and W,

    L(u, v) = mean over images and channels of log(|F(u, v)| + 1e-6)
    Δ(f)    = L(f H / 2, f W / 2) - L(0, 0),   f from 0 to 1 in units of π per pixel of the map

L is the log amplitude spectrum, Δ the relative log amplitude along the diagonal (Park and Kim, "How Do Vision
Transformers Work?", ICLR 2022, section 3, and their code xxxnell/how-do-vits-work; figure 1 of the iFormer paper).
Δ is 0 at frequency 0; the higher it is at f = 1, the more edges and texture are in the map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from paddle import nn
from yacs.config import CfgNode

from analysis.features import find_blocks, watching
from analysis.figures import save_figure
from datasets.transforms import build_eval_transforms
from errors import UserError

EPSILON = 1e-6


@dataclass(frozen=True)
class ModelSpectrum:
    """The log amplitude spectrum L of each block of a network, in its order: float64 ``[H, W]`` by name."""

    title: str
    blocks: dict[str, np.ndarray]

    @property
    def stages(self) -> dict[str, int]:
        """Return the stage of each block; stages number the sizes of maps in the network from 1."""
        sizes = list(dict.fromkeys(spectrum.shape for spectrum in self.blocks.values()))
        return {name: 1 + sizes.index(spectrum.shape) for name, spectrum in self.blocks.items()}

    @property
    def shown(self) -> dict[str, np.ndarray]:
        """Return the spectra that are drawn: all up to six, else the last of each stage."""
        last = {stage: name for name, stage in self.stages.items()}.values()
        return self.blocks if len(self.blocks) <= 6 else {name: self.blocks[name] for name in last}

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a block for a table: name, stage, map, Δ at the frequencies f."""
        found = [(name, spectrum.shape, *relative(spectrum)) for name, spectrum in self.blocks.items()]
        return [{"block": name, "stage": self.stages[name], "map": list(shape),
                 "frequencies": [round(float(f), 4) for f in frequencies],
                 "relative_log_amplitude": [round(float(value), 4) for value in values]}
                for name, shape, frequencies, values in found]


def log_amplitude(maps: np.ndarray) -> np.ndarray:
    """Return log(|F| + 1e-6) of maps ``[..., H, W]``, frequency 0 at ``[..., 0, 0]``, as float64."""
    return np.log(np.abs(np.fft.fft2(maps.astype(np.float64))) + EPSILON)


def relative(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frequencies f, in units of π, and Δ at them of L ``[H, W]``; a map of one pixel has f = 0 alone."""
    side = min(spectrum.shape)
    positions = np.arange(side // 2 + 1) / max(side // 2, 1)
    rows, columns = (np.rint(positions * (side // 2)).astype(int) for side in spectrum.shape)
    return positions * (side // 2 * 2 / side), spectrum[rows, columns] - spectrum[0, 0]


@paddle.no_grad()
def analyse(config: CfgNode, model: nn.Layer, images: Sequence[np.ndarray], title: str = "", layers: str = "",
            batch_size: int = 64, advance: Callable[[int], None] = lambda images: None) -> ModelSpectrum:
    """Return the spectra of a network's blocks over images, uint8 ``[H, W, 3]`` each, transformed as in evaluation.

    ``layers`` names other layers than the blocks (a regular expression over whole names). Raises UserError where it
    matches none, or where none of the layers outputs a map.
    """
    model.eval()
    names = find_blocks(model, layers)
    totals: dict[str, np.ndarray] = {}
    counts = Counter()

    def add(name: str, maps: paddle.Tensor, output: paddle.Tensor) -> None:
        totals[name] = totals.get(name, 0) + log_amplitude(maps.numpy()).sum((0, 1))
        counts[name] += maps.shape[0] * maps.shape[1]

    transform = build_eval_transforms(config.AUGMENT, config.DATA.IMAGE_SIZE)
    with watching(model, names, add):
        for start in range(0, len(images), batch_size):
            batch = transform.batch(images, np.arange(start, min(start + batch_size, len(images))), (0,))
            model(paddle.to_tensor(batch))
            advance(len(batch))
    if not totals:
        raise UserError(f"{', '.join(names[:4])}: none of these layers of {title} outputs a map")
    return ModelSpectrum(title or config.NAME, {name: total / counts[name] for name, total in totals.items()})


@rc_context({"font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
             "legend.fontsize": 8, "grid.alpha": 0.3})
def draw_spectra(models: Sequence[ModelSpectrum], path: Path) -> Path:
    """Write the figure: for each network the spectra of its stages and Δ against frequency, then Δ against depth."""
    columns = max(len(model.shown) for model in models)
    width, height = 1.4 * columns + 4.6, 2.0 * len(models) + 2.9  # inches, as are all margins below
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.85 / width, "right": 1 - 0.2 / width}
    top = GridSpec(len(models), columns + 2, figure, **margins, top=1 - 0.5 / height, bottom=3.05 / height, wspace=0.3,
                   hspace=0.75, width_ratios=[1] * columns + [0.07, 2.0])
    for row, model in enumerate(models):
        _draw_spectra_of(figure, top, row, model)
        axes = figure.add_subplot(top[row, columns + 1])
        box = axes.get_position()
        axes.set_position((box.x0 + 0.75 / width, box.y0, box.width - 0.75 / width, box.height))
        _draw_frequencies(axes, model)
    bottom = GridSpec(1, 1, figure, **margins, top=2.3 / height, bottom=0.5 / height)
    _draw_depth(figure.add_subplot(bottom[0]), models)
    return save_figure(figure, path)


def _draw_spectra_of(figure: Figure, grid: GridSpec, row: int, model: ModelSpectrum) -> None:
    shifted = {name: np.fft.fftshift(spectrum - spectrum[0, 0]) for name, spectrum in model.shown.items()}
    low = min(values.min() for values in shifted.values())
    for column, (name, values) in enumerate(shifted.items()):
        axes = figure.add_subplot(grid[row, column])
        picture = axes.imshow(values, cmap="magma", vmin=low, vmax=0, extent=(-1, 1, -1, 1))
        axes.set(title=f"{_short(name)}\n{values.shape[0]}×{values.shape[1]}", xlabel="frequency in π",
                 xticks=[-1, 0, 1], yticks=[])
        if column == 0:
            axes.set(ylabel=f"{_short(model.title)}\nfrequency in π", yticks=[-1, 0, 1])
    figure.colorbar(picture, cax=figure.add_subplot(grid[row, grid.ncols - 2]), label="Δ log amplitude")


def _draw_frequencies(axes: Axes, model: ModelSpectrum) -> None:
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(model.blocks)))
    for spectrum, colour in zip(model.blocks.values(), colours, strict=True):
        frequencies, values = relative(spectrum)
        if len(values) > 1:
            axes.plot(frequencies, values, color=colour, linewidth=1.2, marker="." if len(values) < 10 else None)
    axes.axhline(0, color="0.6", linewidth=0.6)
    axes.set(title="first block dark, last light", xlabel="frequency in π, diagonal", ylabel="Δ log amplitude")
    axes.grid()


def _draw_depth(axes: Axes, models: Sequence[ModelSpectrum]) -> None:
    for number, model in enumerate(models):
        depths, stages = np.linspace(0, 1, len(model.blocks)), model.stages.values()
        lasts = [relative(spectrum)[1][-1] if min(spectrum.shape) > 1 else np.nan for spectrum in model.blocks.values()]
        label = model.title  # one entry of the legend for all stages
        for stage in dict.fromkeys(stages):
            points = [point for point, own in zip(zip(depths, lasts, strict=True), stages, strict=True) if own == stage]
            if not np.isnan(points[0][1]):
                axes.plot(*zip(*points, strict=True), f"C{number}o-", markersize=3.5, label=label)
                label = None
    axes.set(xlabel="depth: 0 the first block, 1 the last; a line for each size of map, maps of one pixel left out",
             ylabel="Δ log amplitude at the\nhighest frequency of the map")
    axes.grid()
    if axes.lines:
        axes.legend()


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"…{name[1 - length:]}"

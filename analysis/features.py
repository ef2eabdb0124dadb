"""The maps inside a network: which layers are its blocks, and what they put out for images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn

from errors import UserError


def find_blocks(model: nn.Layer, pattern: str = "") -> list[str]:
    """Return the names of a network's blocks in their order, or of the layers whose whole name ``pattern`` matches.

    A network of the suite says which layers are its blocks (``Classifier.block_pattern``); of any other, these are
    the children of its sequences that are layers of layers. Raises UserError for a pattern that is none or that
    matches nothing.
    """
    wanted = pattern or getattr(model, "block_pattern", "")
    try:
        expression = re.compile(wanted)
    except re.error as error:
        raise UserError(f"--layers {pattern!r} is no regular expression: {error}") from None
    composed = [name for name, layer in model.named_sublayers() if list(layer.children())]
    if pattern:
        found = [name for name, _ in model.named_sublayers() if expression.fullmatch(name)]
    elif wanted:
        found = [name for name in composed if expression.fullmatch(name)]
    else:
        found = _children_of_sequences(model, composed)
    if not found:
        names = [name for name, _ in model.named_sublayers()]
        raise UserError(f"--layers {pattern!r} is the name of no layer; layers are called {', '.join(names[:8])}, ..."
                        if pattern else f"{type(model).__name__} has no layers that look like blocks: name some with "
                        "--layers")
    return found


def _children_of_sequences(model: nn.Layer, composed: Sequence[str]) -> list[str]:
    """Return the outermost layers of layers, sequences aside, that stand in a sequence."""
    layers, found = dict(model.named_sublayers()), []
    for name in composed:
        parent = layers.get(name.rpartition(".")[0])
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(parent, nn.Sequential) and not isinstance(layers[name], nn.Sequential) and not inside:
            found.append(name)
    return found


@paddle.no_grad()
def describe_blocks(model: nn.Layer, image_size: int, pattern: str = "") -> list[dict[str, Any]]:
    """Return a row for each block (see ``find_blocks``) that puts out a map: name, kind, channels, height, width.

    One image of zeros, ``image_size`` pixels a side, goes through the network in evaluation mode.
    """
    layers, rows = dict(model.named_sublayers()), []

    def describe(name: str, found: paddle.Tensor) -> None:
        _, channels, height, width = found.shape
        rows.append({"block": name, "kind": type(layers[name]).__name__, "channels": channels, "height": height,
                     "width": width})

    model.eval()
    with watching(model, find_blocks(model, pattern), describe):
        model(paddle.zeros([1, 3, image_size, image_size]))
    return rows


@contextmanager
def watching(model: nn.Layer, names: Sequence[str], see: Callable[[str, paddle.Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the name of each of these layers and its map ``[B, C, H, W]`` whenever the network runs.

    What is no map is left out. Maps with channels last are turned; which they are is told by the sides that are
    equal, and, where that leaves both possible, by the network's ``map_layout``.
    """
    layers, handles = dict(model.named_sublayers()), []
    layout = getattr(model, "map_layout", "NCHW")

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Layer, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, paddle.Tensor) and first.ndim == 4:
                see(name, _channels_first(first, layout))

        return hook

    try:
        handles = [layers[name].register_forward_post_hook(watch(name)) for name in names]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_first(output: paddle.Tensor, layout: str) -> paddle.Tensor:
    _, first, second, last = output.shape
    last_is_channels = first == second and (second != last or layout == "NHWC")
    if first != second and second != last:
        last_is_channels = layout == "NHWC"
    return output.transpose([0, 3, 1, 2]) if last_is_channels else output

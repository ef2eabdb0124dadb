"""The maps inside a network: which layers are its blocks, and what they output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import nn

from errors import UserError, nearest
from utils import Size, pair

See = Callable[[str, paddle.Tensor, paddle.Tensor], None]


def find_blocks(model: nn.Layer, pattern: str = "") -> list[str]:
    """Return the names of a network's blocks, or of the layers whose whole name matches ``pattern``, in order.

    Blocks are the layers that ``Classifier.block_pattern`` matches; in other networks, the outermost composed layers in
    a sequence. Raises UserError for an invalid pattern, or one that matches nothing.
    """
    layers = dict(model.named_sublayers())
    composed = [name for name, layer in layers.items() if list(layer.children())]
    own = getattr(model, "block_pattern", "")
    try:
        found = [name for name in (layers if pattern else composed) if re.fullmatch(pattern or own, name)]
    except re.error as error:
        raise UserError(f"--layers {pattern!r} is no regular expression: {error}") from None
    if not (pattern or own):
        for name in composed:
            inside = any(name.startswith(f"{other}.") for other in found)
            parent = layers.get(name.rpartition(".")[0])
            if isinstance(parent, nn.Sequential) and not isinstance(layers[name], nn.Sequential) and not inside:
                found.append(name)
    if not found and pattern:
        raise UserError(f"--layers {pattern!r} is not the name of a layer{nearest(pattern, layers)}")
    if not found:
        raise UserError(f"{type(model).__name__} has no layers that look like blocks: name some with --layers")
    return found


@paddle.no_grad()
def describe_blocks(model: nn.Layer, image_size: Size, pattern: str = "") -> list[dict[str, Any]]:
    """Return a row for each block (see ``find_blocks``) that outputs a map: name, kind, channels, height, width."""
    layers, rows = dict(model.named_sublayers()), []

    def describe(name: str, maps: paddle.Tensor, output: paddle.Tensor) -> None:
        _, channels, height, width = maps.shape
        rows.append({"block": name, "kind": type(layers[name]).__name__, "channels": channels, "height": height,
                     "width": width})

    model.eval()
    with watching(model, find_blocks(model, pattern), describe):
        model(paddle.zeros([1, 3, *pair(image_size)]))
    return rows


@contextmanager
def watching(model: nn.Layer, names: Sequence[str], see: See) -> Iterator[None]:
    """Call ``see(name, maps, output)`` with the map ``[B, C, H, W]`` of each of these layers whenever the network runs.

    ``output`` is the map as the layer returns it, which may have channels last. Other outputs are left out.
    """
    layers, handles = dict(model.named_sublayers()), []
    layout = getattr(model, "map_layout", "NCHW")

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Layer, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, paddle.Tensor) and first.ndim == 4:
                see(name, first.transpose([0, 3, 1, 2]) if _channels_last(first.shape, layout) else first, first)

        return hook

    try:
        handles = [layers[name].register_forward_post_hook(watch(name)) for name in names]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(shape: Sequence[int], layout: str) -> bool:
    """Return True where the map is ``[B, H, W, C]``: its equal sides tell; otherwise the network's ``map_layout``."""
    _, first, second, last = shape
    return layout == "NHWC" if (first == second) == (second == last) else first == second

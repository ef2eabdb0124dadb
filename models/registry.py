"""The table of networks: names, sources, and how to build them."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import nn

from errors import UserError, nearest
from utils import Size, pair


@dataclass(frozen=True)
class Variant:
    """One network of a paper: its arguments and its published numbers.

    ``parameters`` (trainable) and ``macs`` were counted on the reference implementation with 1,000 classes at
    ``image_size``; ``paper_*`` and the accuracies are what the authors publish on ImageNet-1k.
    """

    arguments: Mapping[str, Any]
    parameters: int | None = None
    macs: int | None = None
    paper_parameters: str = ""
    paper_macs: str = ""
    top1: float | None = None
    top5: float | None = None
    image_size: int = 224
    crop_pct: float | None = None
    interpolation: str = ""
    weights_url: str = ""
    note: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """A registered name: its variant and its paper."""

    name: str
    family: str
    build: Callable[..., nn.Layer] = field(repr=False)
    paper: str
    paper_url: str
    reference: str
    variant: Variant


_MODELS: dict[str, ModelInfo] = {}
_COMMON = ("num_classes", "image_size", "in_chans", "drop_path_rate")
_PADDLE = "paddle/"


def register_family(family: str, build: Callable[..., nn.Layer], variants: Mapping[str, Variant], *, paper: str,
                    paper_url: str, reference: str) -> None:
    """Register the variants of one paper.

    ``build(num_classes, image_size, in_chans, drop_path_rate, **variant.arguments)`` returns the network;
    ``reference`` is the repository (``owner/name@commit``) whose parameter names and numbers it keeps.
    """
    for name, variant in variants.items():
        if name in _MODELS:
            raise ValueError(f"model {name!r} is registered twice")
        _MODELS[name] = ModelInfo(name, family, build, paper, paper_url, reference, variant)


def list_models(pattern: str = "*") -> list[str]:
    """Return the registered names that match a shell pattern, in the order of the model table."""
    return [name for name in _MODELS if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> ModelInfo:
    """Return the entry of a name; raises UserError for an unknown one, naming the nearest."""
    if name.startswith(_PADDLE):
        return _paddle_info(name)
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, _MODELS)}; tools/summary.py lists all")
    return _MODELS[name]


def create_model(name: str, num_classes: int = 1000, image_size: Size | None = None,
                 in_chans: int = 3, drop_path_rate: float = 0.0, **architecture: Any) -> nn.Layer:
    """Build a network: float32 images ``[B, in_chans, H, W]`` to logits ``[B, num_classes]``.

    ``image_size`` is a side or (height, width) in pixels, by default the variant's own (224 unless its name says
    otherwise). ``num_classes=0`` builds without a head and returns features ``[B, num_features]``. ``architecture``
    overrides constructor arguments of the variant. Raises UserError for an unknown name or argument, for what the
    network itself refuses, and for arguments that leave a parameter without numbers.
    """
    info = model_info(name)
    accepted = [key for key in inspect.signature(info.build).parameters if key not in _COMMON]
    for key in architecture:
        if key not in accepted and not name.startswith(_PADDLE):
            raise UserError(f"model {name!r} has no argument {key!r}{nearest(key, accepted)}")
    if num_classes < 0:
        raise UserError(f"num_classes is {num_classes}, expected 0 (features) or more")
    size = info.variant.image_size if image_size is None else image_size
    network = info.build(num_classes=num_classes, image_size=size, in_chans=in_chans, drop_path_rate=drop_path_rate,
                         **{**info.variant.arguments, **architecture})
    smallest = getattr(network, "smallest_image", 1)
    if min(pair(size)) < smallest:
        raise UserError(f"image_size is {size}, expected {smallest} or more a side for {name}")
    for key, parameter in network.named_parameters():
        if 0 in parameter.shape:
            raise UserError(f"{name} with {architecture} has {key} of shape {list(parameter.shape)}, expected no 0")
    return network


def _paddle_info(name: str) -> ModelInfo:
    """Describe ``paddle/<name>``, a network function of ``paddle.vision.models`` as a baseline.

    It keeps the contract of ``create_model``: logits alone (GoogLeNet gives three), and flat features. Its parameters
    keep Paddle's names; it has neither ``forward_features`` nor ``reset_classifier``.
    """
    import paddle.vision.models as zoo

    functions = {_PADDLE + key: getattr(zoo, key) for key in zoo.__all__ if inspect.isfunction(getattr(zoo, key))}
    if name not in functions:
        raise UserError(f"unknown model {name!r}{nearest(name, functions)}")

    def build(num_classes: int, image_size: Size, in_chans: int, drop_path_rate: float, **arguments: Any) -> nn.Layer:
        if in_chans != 3 or drop_path_rate:
            raise UserError(f"{name} has 3 input channels and no drop path, got in_chans={in_chans}, "
                            f"drop_path_rate={drop_path_rate}")
        try:
            network = functions[name](num_classes=num_classes, **arguments)
        except TypeError as error:
            raise UserError(f"{name} does not take these arguments: {error}") from None
        network.register_forward_post_hook(_flatten)
        return network

    return ModelInfo(name, "paddle.vision.models", build, "", "", "PaddlePaddle/Paddle", Variant({}))


def _flatten(layer: nn.Layer, inputs: Any, output: Any) -> paddle.Tensor:
    output = output[0] if isinstance(output, (list, tuple)) else output
    return output.flatten(2).mean(-1) if output.ndim == 4 else output

"""``paddle.hub`` finds the suite's networks and their released weights."""

from __future__ import annotations

import json

import paddle
import pytest

from configs.load import load_config
from engine import released
from engine.model import load_model
from errors import UserError
from processes import ROOT, python


def test_networks_are_listed_described_and_loaded() -> None:
    names = paddle.hub.list(str(ROOT), source="local")
    assert {"iformer_cifar", "convmixer_256_8_cifar10", "coatnet_4", *released.released_names()} <= set(names)
    assert all(name.isidentifier() and name == name.lower() for name in names)
    described = paddle.hub.help(str(ROOT), "iformer_cifar", source="local")
    assert "iFormer" in described and "pretrained" in described

    name = "convmixer_256_8_cifar10"  # not the name of its network
    model = paddle.hub.load(str(ROOT), name, source="local", pretrained=True)
    images = paddle.randn([2, 3, 32, 32])
    own, _ = load_model(load_config(released.folder_of(name) / released.CONFIG), name)
    assert paddle.equal_all(model(images), own(images))
    other = paddle.hub.load(str(ROOT), "iformer_cifar", source="local", num_classes=3)
    assert other(images).shape == [2, 3]


def test_without_released_weights_pretrained_is_an_error() -> None:
    with pytest.raises(UserError, match=r"coatnet_0 has no released weights.*iformer_cifar"):
        paddle.hub.load(str(ROOT), "coatnet_0", source="local", pretrained=True)
    with pytest.raises(RuntimeError, match="Cannot find callable coatnet_9"):
        paddle.hub.load(str(ROOT), "coatnet_9", source="local")


def test_it_works_from_any_folder(tmp_path) -> None:
    """In a process that knows nothing of the suite's folder but through ``paddle.hub``."""
    code = ("import json, paddle; model = paddle.hub.load({0!r}, 'iformer_cifar', source='local', pretrained=True); "
            "print(json.dumps(model(paddle.ones([1, 3, 32, 32])).shape))")
    assert json.loads(python(code.format(str(ROOT)), cwd=tmp_path).splitlines()[-1]) == [1, 10]

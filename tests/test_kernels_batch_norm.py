"""Batch norms of models/layers.py that do the work of their neighbours, against Paddle's own layers."""

# ruff: noqa: F811 (fixtures are imported, then asked for by name)
from __future__ import annotations

import numpy as np
import paddle
from kernel_checks import back_to_auto, compiled, ours  # noqa: F401

from models.layers import GELU, NormAct


def norms():
    """Two sequences that hold the same numbers: our layers, and Paddle's in their place."""
    paddle.seed(0)
    kinds = ((Sequential), (paddle.nn.BatchNorm2D, paddle.nn.Sequential))
    return [sequence(norm(6), GELU(), paddle.nn.Conv2D(6, 6, 1), paddle.nn.ReLU(), norm(6)) for norm, sequence in kinds]


@compiled
def test_sequence_is_paddles_and_those_who_watch_a_layer_see_it(ours):
    own, paddles = norms()
    paddles.set_state_dict(own.state_dict())
    assert set(own.state_dict()) == set(paddles.state_dict())
    x, other = paddle.randn([4, 6, 5, 7]), paddle.randn([4, 6, 5, 7])
    share = paddle.to_tensor([0.0, 1.0, 2.0, 3.0]).reshape([4, 1, 1, 1])
    seen = {}
    for watched in (None, *range(5)):
        handles = [] if watched is None else [model[watched].register_forward_post_hook(
            lambda layer, given, put, model=model: seen.update({model: (given[0].numpy(), put.numpy())}))
            for model in (own, paddles)]
        results = own(x, residual=other, share=share), paddles(x) * share + other
        np.testing.assert_allclose(*(item.numpy() for item in results), rtol=0, atol=1e-5)
        if watched is None:
            assert len(ours) == 3  # two norms with their activations; a GELU alone
        else:
            for one, two in zip(seen[own], seen[paddles], strict=True):
                np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
        for handle in handles:
            handle.remove()
    for name, value in paddles.state_dict().items():
        if name.endswith("_mean"):
            np.testing.assert_allclose(own.state_dict()[name].numpy(), value.numpy(), rtol=0, atol=1e-5)


def test_sequence_with_synchronised_norms(monkeypatch):
    from engine.batch_norm import synchronize

    monkeypatch.setattr(paddle.distributed, "all_reduce", lambda tensor: None)
    own, other = norms()[0], norms()[0]
    x = paddle.randn([4, 6, 5, 7])
    other.set_state_dict(own.state_dict())
    synchronize(other)
    assert not any(isinstance(layer, BatchNorm2D) for layer in other.sublayers())
    share = paddle.to_tensor([0.0, 1.0, 2.0, 3.0]).reshape([4, 1, 1, 1])
    for one, two in ((own(x), other(x)), (own(x, x), other(x, x)), (own(x, None, share), other(x, None, share))):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=0, atol=5e-5)


def test_residual_gradient_is_its_own():
    """Whoever keeps the gradient of the result sees that one, though the residual's goes on to be summed."""
    x = paddle.randn([2, 6, 3, 3])
    x.stop_gradient = False
    hidden = x * 2
    y = NormAct(6)(hidden * 3, residual=hidden)
    y.retain_grads()
    y.backward(paddle.full_like(y, 5.0))
    assert bool((y.grad == 5.0).all())

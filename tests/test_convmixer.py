"""ConvMixer: what it promises beyond what every network does."""

from __future__ import annotations

from math import erf

import numpy as np
import paddle
import pytest

from models import create_model


def depthwise_same(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Correlate each channel with its kernel; of an odd number of padding rows, the last is at the bottom."""
    size = weight.shape[-1]
    around = ((size - 1) // 2, size // 2)
    padded = np.pad(x, ((0, 0), (0, 0), around, around))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return np.einsum("bchwij,cij->bchw", windows, weight[:, 0]) + bias[:, None, None]


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
def test_block_computes_its_equations(kernel_size: int) -> None:
    """Even kernels as well: z' = BN(σ(depthwise(z))) + z, then BN(σ(pointwise(z'))), σ the exact GELU."""
    paddle.seed(0)
    model = create_model("convmixer_256_8", 3, 20, dim=8, depth=2, kernel_size=kernel_size, patch_size=3)
    model.to(dtype="float64")
    model.eval()
    block = getattr(model, "3")
    state = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
    x = np.random.default_rng(0).standard_normal((2, 8, 5, 7))

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))

    fresh_norm = 1 / np.sqrt(1 + 1e-5)
    mixed = gelu(depthwise_same(x, state["0.fn.0.weight"], state["0.fn.0.bias"])) * fresh_norm + x
    pointwise = np.einsum("oc,bchw->bohw", state["1.weight"][:, :, 0, 0], mixed) + state["1.bias"][:, None, None]
    with paddle.no_grad():
        out = block(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(out, gelu(pointwise) * fresh_norm, rtol=0, atol=1e-12)
    model.train()
    model(paddle.randn([4, 3, 20, 20], dtype="float64")).square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.trainable)

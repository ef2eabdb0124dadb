"""Speed of the compiled operators against Paddle's own, alternating in one process: ``python -m kernels.bench``.

Set OMP_NUM_THREADS (and on AMD processors MKL_DEBUG_CPU_TYPE=5) as training does before timing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import paddle

import kernels

# Network and stage, then [B, C, H, W], kernel size, stride.
CASES = (
    ("iFormer-S 32, stage 1", (128, 96, 16, 16), 3, 1),
    ("iFormer-S 32, stage 2", (128, 384, 8, 8), 3, 1),
    ("iFormer-S 32, stage 3", (128, 768, 4, 4), 3, 1),
    ("iFormer-S 32, stage 4", (128, 1024, 2, 2), 3, 1),
    ("iFormer-S 224, stage 1", (8, 192, 56, 56), 3, 1),
    ("iFormer-S 224, stage 2", (8, 384, 28, 28), 3, 1),
    ("iFormer-S 224, stage 3", (8, 768, 14, 14), 3, 1),
    ("ConvMixer-256/8 on CIFAR", (128, 256, 16, 16), 5, 1),
    ("ConvMixer-768/32", (2, 768, 32, 32), 7, 1),
    ("ConvMixer-1536/20", (2, 1536, 32, 32), 9, 1),
    ("Mobile-Former, stride 2", (8, 72, 112, 112), 3, 2),
    ("Mobile-Former, stride 1", (8, 96, 56, 56), 3, 1),
    ("Mobile-Former, small map", (8, 768, 7, 7), 3, 1),
)
MODES = ("stock", "auto")


def times(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of ``call`` for each mode, the modes taking turns."""
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode in MODES:
            kernels.configure(mode)
            start = time.perf_counter()
            call()
            if number:
                taken[mode].append(1e3 * (time.perf_counter() - start))
    return {mode: statistics.median(values) for mode, values in taken.items()}


def main(rounds: int = 7) -> None:
    """Print one row a case: milliseconds forward, and forward with backward."""
    print(kernels.status())
    print("| where | shape | k | s | forward: stock | ours | ratio | with backward: stock | ours | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for where, shape, size, stride in CASES:
        x, weight = paddle.randn(shape), paddle.randn([shape[1], 1, size, size])
        bias = paddle.zeros([shape[1]])
        arguments = (x, weight, bias, stride, size // 2)
        grad = paddle.ones_like(kernels.depthwise_conv2d(*arguments))

        def forward(arguments=arguments):
            with paddle.no_grad():
                kernels.depthwise_conv2d(*arguments)

        def both(arguments=arguments, grad=grad):
            kernels.depthwise_conv2d(*arguments).backward(grad)
            for tensor in arguments[:3]:
                tensor.clear_gradient(set_to_zero=False)

        cells = []
        one = times(forward, rounds)
        for tensor in (x, weight, bias):
            tensor.stop_gradient = False
        for taken in (one, times(both, rounds)):
            cells += [f"{taken[mode]:.2f}" for mode in MODES] + [f"{taken['stock'] / taken['auto']:.1f}×"]
        print(f"| {where} | {'×'.join(map(str, shape))} | {size} | {stride} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

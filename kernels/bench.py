"""Speed of the compiled operators against Paddle's own, taking turns in one process: ``python -m kernels.bench``.

Set OMP_NUM_THREADS (and on AMD processors MKL_DEBUG_CPU_TYPE=5) as training does before timing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import paddle

import kernels

# Where it stands, [B, C, H, W], kernel size, stride.
DEPTHWISE = (
    ("iFormer-S at 32, stage 1", (128, 160, 8, 8), 3, 1),
    ("iFormer-S at 32, stage 2", (128, 288, 4, 4), 3, 1),
    ("iFormer-S at 32, stage 3", (128, 416, 2, 2), 3, 1),
    ("iFormer-S at 224, stage 1", (8, 160, 56, 56), 3, 1),
    ("iFormer-S at 224, stage 2", (8, 288, 28, 28), 3, 1),
    ("iFormer-S at 224, stage 3", (8, 416, 14, 14), 3, 1),
    ("ConvMixer-256/8, 16×16 patches", (128, 256, 16, 16), 5, 1),
    ("ConvMixer-768/32 at 224", (2, 768, 32, 32), 7, 1),
    ("ConvMixer-1536/20 at 224", (2, 1536, 32, 32), 9, 1),
    ("Mobile-Former-294M at 224", (8, 96, 112, 112), 3, 2),
    ("Mobile-Former-294M at 224", (8, 96, 56, 56), 3, 1),
    ("Mobile-Former-294M at 224", (8, 768, 7, 7), 3, 1),
)
DENSE = (
    ("iFormer-S at 32, patch embedding 2", (128, 96, 8, 8), 192, 3, 2),
    ("iFormer-S at 32, patch embedding 3", (128, 192, 4, 4), 320, 3, 2),
    ("CoAtNet-0 at 224, stem", (4, 64, 112, 112), 64, 3, 1),
    ("ConvMixer-256/8, 16×16 patches", (128, 256, 16, 16), 256, 1, 1),
    ("PoolFormer-S12 at 224, stage 3", (8, 320, 14, 14), 1280, 1, 1),
)
# Where it stands, [B, C, H, W], channels that leave, groups, kernel size, stride.
GROUPED = (
    ("Mobile-Former-26M at 32, block 2", (128, 12, 4, 4), 72, 12, 3, 1),
    ("Mobile-Former-26M at 224, block 2", (8, 12, 56, 56), 72, 12, 3, 2),
    ("Mobile-Former-26M at 224, block 4", (8, 24, 28, 28), 72, 4, 1, 1),
)
# Where it stands, [B, C, H, W].
PLANES = (
    ("Mobile-Former-26M at 32", (128, 72, 4, 4)),
    ("Mobile-Former-26M at 224", (8, 72, 28, 28)),
)
# Where it stands, the rows [..., C], and the outputs of the linear layer.
ROWS = (
    ("iFormer-S at 32, stage 2", (128, 16, 192), 768),
    ("iFormer-S at 32, stage 3", (128, 4, 320), 1280),
    ("iFormer-S at 224, stage 3", (8, 196, 320), 1280),
)
# Where it stands, the packed queries, keys and values [B, N, 3, heads, d], and whether logits have a bias.
ATTENTION = (
    ("iFormer-S at 32, stage 3", (128, 4, 3, 7, 32), False),
    ("iFormer-S at 224, stage 1", (8, 784, 3, 1, 32), False),
    ("iFormer-S at 224, stage 3", (8, 196, 3, 7, 32), False),
    ("CoAtNet-0 at 224, stage 3", (4, 196, 3, 12, 32), True),
)
# Where it stands, the map [B, C, H, W], tokens, heads.
BRIDGES = (
    ("Mobile-Former-26M at 32, block 2", (128, 12, 8, 8), 3, 2),
    ("Mobile-Former-26M at 32, block 6", (128, 48, 2, 2), 3, 2),
    ("Mobile-Former-26M at 224, block 2", (8, 12, 56, 56), 3, 2),
    ("Mobile-Former-294M at 224, block 6", (8, 96, 14, 14), 6, 2),
)
# Where it stands, and the channels-last map [B, H, W, C]: filtered with four planes, as DFFormer does.
FILTERS = (
    ("DFFormer-S18 at 32, stage 1", (64, 8, 8, 128)),
    ("DFFormer-S18 at 32, stage 3", (64, 2, 2, 640)),
    ("DFFormer-S18 at 224, stage 1", (8, 56, 56, 128)),
    ("DFFormer-S18 at 224, stage 3", (8, 14, 14, 640)),
)
# The same of the maps that the operators of PoolFormer and DFFormer see.
MAPS = (
    ("DFFormer-S18, PoolFormer-S12 at 32, stage 2", (64, 4, 4, 128)),
    ("DFFormer-S18, PoolFormer-S12 at 224, stage 1", (8, 56, 56, 64)),
    ("DFFormer-S18, PoolFormer-S12 at 224, stage 3", (8, 14, 14, 320)),
)
# The same of batch norms, and what goes with them.
NORMS = (
    ("ConvMixer-256/8, depthwise part", (128, 256, 16, 16), ("before", "gelu"), True),
    ("CoAtNet-0 at 224, stage 1", (4, 384, 112, 112), ("after", "gelu"), False),
    ("Mobile-Former-294M at 224, block 2", (8, 96, 56, 56), None, False),
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


def row(where: str, what: str, function: Callable[..., paddle.Tensor], sizes: tuple, rounds: int) -> None:
    """Print the milliseconds of an operator on random inputs of these sizes: forward, and with backward."""
    inputs = [paddle.randn(size) for size in sizes]
    grad = paddle.ones_like(function(*inputs))

    def forward() -> None:
        with paddle.no_grad():
            function(*inputs)

    def both() -> None:
        function(*inputs).backward(grad)
        for tensor in inputs:
            tensor.clear_gradient(set_to_zero=False)

    results = [times(forward, rounds)]
    for tensor in inputs:
        tensor.stop_gradient = False
    results.append(times(both, rounds))
    cells = [f"{taken['stock']:.2f} | {taken['auto']:.2f} | {taken['stock'] / taken['auto']:.1f}×" for taken in results]
    print(f"| {where} | {what} | {' | '.join(cells)} |", flush=True)


def main(rounds: int = 9) -> None:
    """Print a table of all operators."""
    print(kernels.status())
    print("| where | what | forward: stock | ours | ratio | with backward: stock | ours | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for where, shape, size, stride in DEPTHWISE:
        function = partial(kernels.depthwise_conv2d, stride=stride, padding=size // 2)
        what = f"depthwise {'×'.join(map(str, shape))}, {size}×{size}, stride {stride}"
        row(where, what, function, (shape, (shape[1], 1, size, size)), rounds)
    for where, shape, out, size, stride in DENSE:
        function = partial(kernels.conv2d, stride=stride, padding=size // 2)
        what = f"dense {'×'.join(map(str, shape))} to {out}, {size}×{size}, stride {stride}"
        row(where, what, function, (shape, (out, shape[1], size, size), (out,)), rounds)
    for where, shape, out, groups, size, stride in GROUPED:
        function = partial(kernels.conv2d, stride=stride, padding=size // 2, groups=groups)
        what = f"{groups} groups {'×'.join(map(str, shape))} to {out}, {size}×{size}, stride {stride}"
        row(where, what, function, (shape, (out, shape[1] // groups, size, size)), rounds)
    for where, shape in PLANES:
        what = f"dynamic ReLU {'×'.join(map(str, shape))}"
        row(where, what, kernels.dynamic_relu, (shape, shape[:2], shape[:2]), rounds)
    for where, shape, activation, connected in NORMS:
        what = f"batch norm {'×'.join(map(str, shape))}"
        what += f", GELU {activation[0]}" if activation else ""
        what += ", residual" if connected else ""
        running = paddle.zeros([shape[1]]), paddle.ones([shape[1]])
        settings = {activation[0]: activation[1]} if activation else {}

        def norm(x, weight, bias, residual=None, running=running, settings=settings):
            return kernels.batch_norm(x, *running, weight, bias, training=True, residual=residual, **settings)

        row(where, what, norm, (shape, (shape[1],), (shape[1],), *([shape] if connected else [])), rounds)
    for where, shape, biased in ATTENTION:
        what = f"attention {'×'.join(map(str, shape))}{', bias' if biased else ''}"
        bias = ((shape[3], shape[1], shape[1]),) if biased else ()
        row(where, what, kernels.self_attention, (shape, *bias), rounds)
    for where, shape, count, heads in BRIDGES:
        text, tokens = f"{count} tokens, map {'×'.join(map(str, shape))}", (shape[0], count, shape[1])
        row(where, f"{text}: tokens ask", partial(kernels.attend_map, heads=heads), (tokens, shape), rounds)
        row(where, f"{text}: the map asks", partial(kernels.attend_tokens, heads=heads), (shape, tokens, tokens),
            rounds)
    for where, shape, out in ROWS:
        text = "×".join(map(str, shape))
        row(where, f"layer norm {text}", kernels.layer_norm, (shape, shape[-1:], shape[-1:]), rounds)
        row(where, f"linear {text} to {out}", kernels.linear, (shape, (shape[-1], out), (out,)), rounds)
        row(where, f"GELU {'×'.join(map(str, shape[:-1]))}×{out}", kernels.gelu, ((*shape[:-1], out),), rounds)
    for where, shape in FILTERS:
        plane, scores = (shape[1] * (shape[2] // 2 + 1), 4), (shape[0], 4, shape[3])
        what = f"filter {'×'.join(map(str, shape))}"
        row(where, what, kernels.filter_spectrum, (shape, plane, plane, scores), rounds)
    for where, shape in MAPS:
        text, channels = "×".join(map(str, shape)), shape[-1:]
        row(where, f"residual {text}, scaled", kernels.residual, (shape, shape, channels), rounds)
        row(where, f"group norm {text}", kernels.group_norm, (shape, channels, channels), rounds)
        row(where, f"pooling {text}", partial(kernels.pool_difference, size=3), (shape,), rounds)
        row(where, f"StarReLU {text}, 4 times as wide", kernels.star_relu, ((*shape[:-1], 4 * shape[-1]), (1,), (1,)),
            rounds)


if __name__ == "__main__":
    main()

"""Mixed precision of the CPU: products whose operands are rounded to bfloat16."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from kernel_checks import assert_threads_change_no_bit, openmp, stock, with_gradients

import kernels
from configs.load import load_config
from engine import runtime
from engine.sync_batch_norm import convert_sync_batch_norm
from errors import UserError
from kernels import build
from models.coatnet import MBConvBlock
from models.coatnet_simple import MBConv
from models.convmixer import Block as ConvMixerBlock

pytestmark = pytest.mark.skipif(not kernels.status().get("bfloat16"), reason="no AVX512_BF16 here")

SIZES = [(1, 1, 1), (3, 5, 7), (14, 32, 64), (15, 33, 65), (29, 17, 1), (200, 100, 1030), (400, 2100, 30),
         (410, 48, 513), (900, 130, 700)]


def rounded(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, as float64."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_product_of_rounded_operands(m: int, n: int, k: int, transposed: bool) -> None:
    """Against float64 products of operands that numpy has rounded: what is left is the float32 sum."""
    rng = np.random.default_rng(m * n * k)
    a, b = (rng.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n)))
    expected = rounded(a) @ rounded(b)

    def product() -> np.ndarray:
        with kernels.bfloat16_products():
            return kernels.product(paddle.to_tensor(a), paddle.to_tensor(b.T.copy() if transposed else b),
                                   transposed).numpy()

    bound = 2**-21 * max(k, 8)  # rounding of that many sums; bfloat16 alone would be some 1e-3 √k
    np.testing.assert_allclose(product(), expected, rtol=0, atol=bound)
    assert_threads_change_no_bit(product)


# Shapes of image, weight and bias, and the groups of a convolution (None: a linear layer).
LAYERS = {"linear": ([(40, 48), (48, 33), (33,)], None), "pointwise": ([(9, 48, 8, 8), (24, 48, 1, 1), (24,)], 1),
          "several chunks": ([(5, 48, 60, 60), (24, 48, 1, 1), (24,)], 1),
          "grouped": ([(3, 32, 7, 7), (24, 16, 3, 3), (24,)], 2)}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_follow_the_context_backward_too(kind: str) -> None:
    """All operands rounded: as Paddle's operators in float64 say, with gradients of the rounded gradient."""
    shapes, groups = LAYERS[kind]
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def function(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        if groups is None:
            return kernels.linear(x, weight, bias)
        return kernels.conv2d(x, weight, bias, padding=groups - 1, groups=groups)

    def mixed(*inputs: paddle.Tensor) -> paddle.Tensor:
        with kernels.bfloat16_products():
            return function(*inputs)

    y = mixed(*map(paddle.to_tensor, values))
    slope = np.cos(np.arange(y.size)).reshape(y.shape).astype(np.float32)
    exact = [*map(rounded, values[:2]), values[2]]
    expected = with_gradients(stock(function), exact, rounded(slope), "float64")
    found, plain = (with_gradients(run, values, slope) for run in (mixed, function))
    for own, reference, single in list(zip(found, expected, plain, strict=True))[:3]:
        spread = reference.std()
        assert abs(own - reference).max() < 1e-5 * spread
        assert abs(single - reference).max() > 1e-3 * spread  # in float32 the operands are not rounded


def feed_forward(shape, hidden, transposed=False, biases=True, star=False, factors=(), of_images=False):
    """A fused branch as a function of its tensors by name, and their sizes."""
    columns = shape[-1]
    wide, tall = (columns, hidden), (hidden, columns)
    sizes = {"x": shape, "norm_weight": (columns,), "norm_bias": (columns,), "first": tall if transposed else wide,
             "second": wide if transposed else tall} | dict.fromkeys(factors, (columns,))
    sizes |= {"first_bias": (hidden,), "second_bias": (columns,)} if biases else {}
    sizes |= {"star_scale": (1,), "star_bias": (1,)} if star else {}

    def call(t):
        return kernels.feed_forward(
            t["x"], (t["norm_weight"], t["norm_bias"]), (t["first"], t.get("first_bias")),
            (t["second"], t.get("second_bias")), 1e-6, transposed, t.get("kept"), t.get("scale"), share(t["x"]),
            (t["star_scale"], t["star_bias"]) if star else None, of_images)

    return call, sizes


def inception_mixer(batch, height, width, half, low, heads, pool_size, bias=True, scale=True):
    columns, fused = 2 * half + low, 4 * half + low
    sizes = {"x": (batch, height, width, columns), "norm_weight": (columns,), "norm_bias": (columns,),
             "conv": (2 * half, half), "depthwise": (2 * half, 1, 3, 3), "pool": (2 * half, half),
             "pool_bias": (2 * half,), "qkv": (low, 3 * low), "fuse": (fused, 1, 3, 3), "out": (columns, fused),
             "out_bias": (columns,)}
    sizes |= ({"qkv_bias": (3 * low,)} if bias else {}) | ({"scale": (columns,)} if scale else {})

    def call(t):
        return kernels.inception_mixer(
            t["x"], (t["norm_weight"], t["norm_bias"]), (t["conv"], t["depthwise"]), (t["pool"], t["pool_bias"]),
            (t["qkv"], t.get("qkv_bias")), t["fuse"], (t["out"], t["out_bias"]), heads, pool_size, 1e-6, t.get("scale"),
            share(t["x"]))

    return call, sizes


def mbconv(shape, hidden, out, stride=1, training=True, bias=True):
    channels = shape[1]
    sizes = {"x": shape, "expand": (hidden, channels, 1, 1), "weight1": (hidden,), "bias1": (hidden,),
             "depthwise": (hidden, 1, 3, 3), "weight2": (hidden,), "bias2": (hidden,), "gate": (hidden, hidden),
             "project": (out, hidden, 1, 1)} | ({"bias": (out,)} if bias else {})

    def call(t):
        return kernels.mbconv(
            t["x"], t["expand"], new_norm(t, 1), t["depthwise"], new_norm(t, 2),
            lambda means: F.sigmoid(means @ t["gate"]), (t["project"], t.get("bias")), stride, training)

    return call, sizes


def convmixer_block(shape, side, training=True, biases=True):
    channels = shape[1]
    sizes = {"x": shape, "depthwise": (channels, 1, side, side), "weight1": (channels,), "bias1": (channels,),
             "pointwise": (channels, channels, 1, 1), "weight2": (channels,), "bias2": (channels,)}
    sizes |= {"depthwise_bias": (channels,), "pointwise_bias": (channels,)} if biases else {}

    def call(t):
        return kernels.convmixer_block(
            t["x"], (t["depthwise"], t.get("depthwise_bias")), new_norm(t, 1),
            (t["pointwise"], t.get("pointwise_bias")), new_norm(t, 2), share(t["x"]) if biases else None, training)

    return call, sizes


def new_norm(t, number):
    weight = t[f"weight{number}"]
    return paddle.zeros_like(weight), paddle.ones_like(weight), weight, t[f"bias{number}"]


def share(x: paddle.Tensor) -> paddle.Tensor:
    return paddle.to_tensor(np.arange(x.shape[0]) % 3, x.dtype).reshape([-1] + [1] * (x.ndim - 1))


def draw(sizes):
    """Weights whose products have a spread of about 1."""
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(size) / max(np.prod(size[1:]), 1) ** (0.5 * (name != "x"))).astype("float32")
            for name, size in sizes.items()}


def gradients(function, values, mixed, dtype="float32"):
    tensors = {name: paddle.to_tensor(value, dtype, stop_gradient=False) for name, value in values.items()}
    with kernels.bfloat16_products() if mixed else kernels.using("stock"):
        y = function(tensors)
    y.backward(paddle.to_tensor(np.random.default_rng(1).standard_normal(y.shape), dtype))
    return {"y": y.numpy(), **{name: tensor.grad.numpy() for name, tensor in tensors.items()}}


# Sizes with incomplete vectors, tiles and blocks, several groups of rows, bands, and sides of 1.
BRANCHES = [
    feed_forward((4, 3, 5, 17), 33, factors=("kept", "scale")), feed_forward((4, 3, 5, 17), 33, True, False),
    feed_forward((2, 64), 40, biases=False, star=True), feed_forward((30, 37, 48), 131, True, factors=("scale",)),
    feed_forward((5, 400, 18), 60, star=True, factors=("kept",)), feed_forward((2, 1), 1),
    inception_mixer(2, 6, 5, 8, 12, 3, 1), inception_mixer(3, 7, 9, 24, 6, 3, 2, False, False),
    inception_mixer(40, 4, 4, 48, 96, 3, 2), inception_mixer(2, 71, 61, 16, 20, 2, 2),
    inception_mixer(130, 1, 1, 16, 64, 2, 1),
    feed_forward((3, 4, 5, 17), 33, True, factors=("scale",), of_images=True),
    feed_forward((30, 37, 1, 48), 131, factors=("kept",), of_images=True),
    feed_forward((2, 1, 1, 1), 3, of_images=True),
    mbconv((3, 7, 5, 6), 32, 9), mbconv((2, 16, 71, 61), 64, 40, 2), mbconv((40, 48, 4, 4), 96, 17, 2, bias=False),
    mbconv((2, 33, 90, 1), 32, 64), mbconv((1, 12, 40, 57), 32, 2, 1, False), mbconv((130, 5, 2, 3), 64, 33, 2, False),
    convmixer_block((3, 32, 7, 5), 5), convmixer_block((40, 64, 4, 4), 3, biases=False),
    convmixer_block((2, 96, 61, 71), 9), convmixer_block((130, 32, 1, 2), 5, False),
]


@pytest.mark.parametrize("branch", BRANCHES)
def test_branches_follow_their_definition(branch, ours) -> None:
    """Against Paddle's operators in float64. The errors are those of a chain of roundings of up to 2⁻⁹.

    They are larger where another maximum of a window wins, and in sums whose terms cancel: StarReLU's, and those
    before a batch norm, which takes scale and mean away again.
    """
    function, sizes = branch
    values = draw(sizes)
    exact = gradients(function, values, False, "float64")
    assert not ours
    for name, found in gradients(function, values, True).items():
        error, spread = np.sqrt(np.square(found - exact[name]).mean()), np.sqrt(np.square(exact[name]).mean())
        cancels = "weight1" in sizes and name in ("weight1", "bias1", "depthwise", "depthwise_bias", "pointwise_bias")
        bound = 3e-2 if (name == "x" and "fuse" in sizes) or found.size == 1 or cancels else 1e-2
        assert found.shape == exact[name].shape
        assert error <= bound * spread + 1e-6, name
    assert len([name for name in ours if name != "hybrid_move_channels"]) == 1 + ("gate" in sizes)


@pytest.mark.parametrize("branch", [BRANCHES[number] for number in (4, 9, 12, 15, 22)])
def test_threads_change_no_bit_of_branches(branch) -> None:
    function, sizes = branch
    assert_threads_change_no_bit(lambda: list(gradients(function, draw(sizes), True).values()))


@pytest.mark.parametrize("branch", [BRANCHES[number] for number in (0, 1, 2, 6, 14, 20)])
def test_wrong_shapes_raise(branch) -> None:
    """Each tensor in turn has one number more along each of its axes."""
    function, sizes = branch
    for wrong, shape in sizes.items():
        for axis in range(len(shape)):
            if wrong == "x" and axis != (1 if "weight1" in sizes else len(shape) - 1):
                continue  # the other tensors say nothing about it
            other = [size + (place == axis) for place, size in enumerate(shape)]
            tensors = {name: paddle.rand(other if name == wrong else size) for name, size in sizes.items()}
            with kernels.bfloat16_products(), pytest.raises(ValueError):
                function(tensors)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["mbconv", "convmixer_block"])
def test_running_statistics_move_as_batch_norms_do(kind: str, training: bool) -> None:
    rng, found = np.random.default_rng(0), {}
    x, first, depthwise, last = (rng.standard_normal(size).astype("float32") for size in (
        (3, 32, 9, 10), (32, 32, 1, 1), (32, 1, 3, 3), (32, 32, 1, 1)))
    for mixed in (True, False):
        norms = [[paddle.full([32], value) for value in (0.5, 2.0, 1.0, 0.0)] for _ in range(2)]
        x_, first_, depthwise_, last_ = map(paddle.to_tensor, (x, first, depthwise, last))
        with kernels.bfloat16_products() if mixed else kernels.using("stock"):
            if kind == "mbconv":
                kernels.mbconv(x_, first_, norms[0], depthwise_, norms[1], lambda means: means, (last_, None), 2,
                               training, 0.7)
            else:
                kernels.convmixer_block(x_, (depthwise_, None), norms[0], (last_, None), norms[1], None, training, 0.7)
        found[mixed] = [norm[which].numpy() for norm in norms for which in (0, 1)]
    for mixed, exact in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(mixed, exact, rtol=1e-2, atol=1e-2)
        assert (np.ptp(exact) > 0) == training


BLOCKS = {"MBConv": ("hybrid_mbconv_expand", lambda: MBConvBlock(32, 32, 1, 0.5, 4.0, 0.25)),
          "MBConv, stride 2": ("hybrid_mbconv_expand", lambda: MBConvBlock(32, 64, 2, 0.5, 4.0, 0.25)),
          "simple": ("hybrid_mbconv_expand", lambda: MBConv(32, 32, 1, 0.5, 4.0, 0.25)),
          "simple, stride 2": ("hybrid_mbconv_expand", lambda: MBConv(32, 64, 2, 0.5, 4.0, 0.25)),
          "ConvMixer": ("hybrid_convmixer_block", lambda: ConvMixerBlock(32, 5, "gelu", 0.5))}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_follow_their_layers(kind: str, ours) -> None:
    operator, build_block = BLOCKS[kind]
    block, x = build_block(), paddle.randn([6, 32, 9, 7])
    found = []
    for context in (nullcontext(), kernels.bfloat16_products()):
        ours.clear()
        paddle.seed(0)  # of the drop path
        with context:
            found.append(block(x).numpy())
    assert operator in ours
    assert 0 < np.square(found[1] - found[0]).mean() ** 0.5 < 1e-2 * found[0].std()


@pytest.mark.parametrize("kind", ["MBConv", "ConvMixer"])
def test_replaced_norms_are_called(kind: str, ours) -> None:
    operator, build_block = BLOCKS[kind]
    block = build_block()
    convert_sync_batch_norm(block)
    block.eval()
    with kernels.bfloat16_products():
        block(paddle.rand([2, 32, 5, 5]))
    assert ours and operator not in ours


@pytest.mark.parametrize(("side", "act"), [(4, "gelu"), (5, "relu")])
def test_other_blocks_of_convmixer_are_separate_layers(side: int, act: str, ours) -> None:
    with kernels.bfloat16_products():
        ConvMixerBlock(32, side, act, 0.0)(paddle.rand([2, 32, 5, 5]))
    assert ours and "hybrid_convmixer_block" not in ours


def test_attention_keeps_no_memory() -> None:
    """With one thread, Paddle's OpenMP library never frees what a parallel region inside another one takes."""
    qkv, sizes, before = paddle.randn([16, 64, 3, 2, 8]), [], openmp().omp_get_max_threads()
    qkv.stop_gradient = False
    openmp().omp_set_num_threads(1)
    for _ in range(2):
        for _ in range(300):
            with kernels.bfloat16_products():
                kernels.self_attention(qkv).sum().backward()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    openmp().omp_set_num_threads(before)
    assert sizes[1] - sizes[0] < 4 << 20  # 8 MB and more with such regions


def test_attention_follows_the_context() -> None:
    query, key, value = (paddle.randn([2, 60, 3, 32]) for _ in range(3))
    single = kernels.attention(query, key, value)
    with kernels.bfloat16_products():
        mixed = kernels.attention(query, key, value)
    error = float((mixed - single).square().mean().sqrt() / single.square().mean().sqrt())
    assert 1e-4 < error < 1e-2


def test_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("configs/quickstart.yaml", ["TRAIN.PRECISION=bfloat16"])
    runtime.start(config)
    runtime.check_precision("bfloat16")
    with pytest.raises(UserError, match="float16, but a CPU trains in float32 or bfloat16"):
        runtime.check_precision("float16")
    with pytest.raises(UserError, match="AMP_LEVEL is O2, but levels are a GPU's; expected O1 on a CPU"):
        runtime.check_precision("bfloat16", "O2")
    with pytest.raises(UserError, match="AMP_LEVEL is O2, but TRAIN"):
        runtime.check_precision("float32", "O2")
    with kernels.using("stock"), pytest.raises(UserError, match="stock operators were asked for"):
        runtime.check_precision("bfloat16")
    monkeypatch.setattr(build.library(), "bfloat16", False)
    with pytest.raises(UserError, match="AVX512_BF16"):
        runtime.check_precision("bfloat16")


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_on_a_gpu_the_context_is_paddles(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.amp, "auto_cast", lambda **arguments: arguments)
    runtime.check_precision("float16", level)
    assert runtime.autocast("float16", level) == {"level": level, "dtype": "float16"}


def test_predictions_and_explanations_in_bfloat16_are_near_those_in_float32() -> None:
    from analysis.explain.image_model import ImageModel
    from engine.model import build_model, predict

    image, found = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), {}
    for precision in ("float32", "bfloat16"):
        config = load_config("configs/quickstart.yaml", [f"RUNTIME.EVAL_PRECISION={precision}"])
        runtime.start(config)
        runtime.seed_everything(0)
        model = build_model(config)
        model.eval()
        found[precision] = predict(config, model, [image])[0], ImageModel(config, model).probabilities_of(image)
    for exact, rounded_ in zip(found["float32"], found["bfloat16"], strict=True):
        assert 0 < abs(exact - rounded_).max() < 0.01
    with pytest.raises(UserError, match=r"EVAL_PRECISION is bfloat16, but on a CPU .* expected float32$"):
        runtime.start(load_config(None, ["RUNTIME.EVAL_PRECISION=bfloat16", "RUNTIME.KERNELS=stock"]))
    kernels.configure("auto")

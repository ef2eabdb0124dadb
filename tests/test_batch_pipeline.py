"""The pipeline by batch: the reference's draws and pixels, bit by bit, and the reference where it cannot be used."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernel_checks import compiled
from test_transforms import augment, pictures

import kernels
from configs.load import load_config
from datasets import batch
from datasets.batch import KEPT, BatchPipeline, Memory, Unsupported
from datasets.randaugment import OPERATIONS, RandAugment
from datasets.transforms import (
    ColorJitter,
    Normalize,
    Pipeline,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    Resize,
    build_eval_transforms,
    build_train_transforms,
)
from engine.data import build_eval_loader, build_train_loader
from errors import UserError
from processes import ROOT

PLAIN = {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "ROTATION": 0.0, "HFLIP": 0.0}
RECIPES = {
    "iformer": {},
    "dfformer": {"CROP_SCALE": [0.6, 1.0]},
    "padded": {**PLAIN, "CROP": "pad", "HFLIP": 0.5},
    "convmixer": {**PLAIN, "CROP_SCALE": [1.0, 1.0], "CROP_RATIO": [1.0, 1.0], "HFLIP": 0.5, "RANDAUGMENT_N": 2,
                  "RANDAUGMENT_M": 12.0},
    "all, strong": {"CROP_RATIO": [0.2, 0.5], "BRIGHTNESS": 1.0, "CONTRAST": 1.0, "SATURATION": 1.0, "ROTATION": 180.0,
                    "RANDAUGMENT_N": 3, "RANDAUGMENT_M": 30.0, "ERASING": 0.7},
}  # fmt: skip
MEANS = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def assert_equal_to_reference(pipeline: Pipeline, images, rounds: int = 2) -> None:
    by_batch, indices = BatchPipeline(pipeline), np.arange(len(images))
    for epoch in range(rounds):
        expected = pipeline.batch(images, indices, (42, 2, epoch))
        got = by_batch.batch(images, indices, (42, 2, epoch))
        assert got.dtype == np.float32 and got.shape == (len(images), 3, *pipeline.size)
        np.testing.assert_array_equal(got, expected)


@compiled
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 80), (35, 33)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_equal_the_reference_bit_by_bit(recipe, size):
    pipeline = build_train_transforms(augment(**RECIPES[recipe]), list(size))
    for height, width in [(32, 32), (40, 90), (70, 9), (2 * size[0], 2 * size[1])]:
        assert_equal_to_reference(pipeline, np.stack(pictures(6, height, width)))


TRANSFORMS = {
    "crop": RandomResizedCrop((32, 24)),
    "no box fits": RandomResizedCrop((32, 24), (1.0, 1.0), (0.1, 0.2)),
    "pad": RandomCrop(4),
    "pad by more than the image": RandomCrop(50),
    "flip": RandomHorizontalFlip(0.5),
    "brightness": ColorJitter(brightness=0.9),
    "contrast": ColorJitter(contrast=0.9),
    "saturation": ColorJitter(saturation=0.9),
    "jitter": ColorJitter(0.4, 0.4, 0.4),
    "rotation": RandomRotation(180.0),
    **{f"randaugment {magnitude}": RandAugment(1, magnitude) for magnitude in (0.0, 3.5, 9.0, 15.0, 30.0)},
    "erasing": RandomErasing(0.8),
}


@compiled
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform_for_many_draws(name):
    """A hundred and twenty draws of one transform alone, on images of flat areas too (equalisation, contrast)."""
    transform = TRANSFORMS[name]
    first = [transform] if isinstance(transform, RandomResizedCrop) else [Resize((32, 24)), transform]
    steps = (first[0], MEANS, transform) if isinstance(transform, RandomErasing) else (*first, MEANS)
    flat = [np.full((32, 24, 3), value, np.uint8) for value in (0, 7, 255)]
    flat += [np.where(np.arange(24)[:, None] < 12, low, high) + np.zeros((32, 24, 3), np.uint8) for low, high in
             np.array([[3, 200], [0, 255], [90, 91]], np.uint8)]
    assert_equal_to_reference(Pipeline(steps, (32, 24)), np.stack([*pictures(24, 32, 24), *flat]), rounds=4)


@compiled
def test_every_operation_of_randaugment_is_drawn_above():
    drawn = {RandAugment(1, 9.0).draw(np.random.default_rng([42, 2, epoch, index]), 32, 24)[0][0]
             for epoch in range(4) for index in range(30)}
    assert drawn == set(OPERATIONS)


@compiled
def test_draws_are_numpys_for_all_kinds_of_seeds():
    pipeline = Pipeline((RandomResizedCrop((8, 8)), RandomHorizontalFlip(0.5), MEANS), (8, 8))
    images = np.random.default_rng(3).integers(0, 256, (500, 20, 20, 3), np.uint8)
    for place in [(0,), (2**31 - 1, 2, 0), (1, 2, 3, 4, 5), (2**32 - 1, 2**32 - 1)]:
        indices = np.random.default_rng(4).permutation(500)
        np.testing.assert_array_equal(BatchPipeline(pipeline).batch(images, indices, place),
                                      pipeline.batch(images, indices, place))


@compiled
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 32), (8, 8, 32), (50, 30, [16, 24]),
                                                       (64, 64, 32), (333, 500, 96)])
def test_evaluation_is_unchanged(height, width, size):
    assert_equal_to_reference(build_eval_transforms(augment(), size), np.stack(pictures(4, height, width)), rounds=1)


@compiled
def test_images_of_their_own_sizes_and_views():
    pipeline = build_train_transforms(augment(), 32)
    own = [*pictures(2, 40, 50), *pictures(2, 30, 20), *pictures(1, 32, 32)]
    assert_equal_to_reference(pipeline, own)
    assert_equal_to_reference(pipeline, np.broadcast_to(np.stack(pictures(5, 28, 28))[..., :1], (5, 28, 28, 3)))
    with pytest.raises(IndexError, match="images 0 to 5 were asked for, there are 5"):
        BatchPipeline(pipeline).batch(np.zeros((5, 8, 8, 3), np.uint8), np.arange(6), (1,))
    for wrong in (np.zeros((5, 8, 8), np.uint8), np.zeros((5, 8, 8, 3), np.float32), np.zeros((5, 0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
            BatchPipeline(pipeline).batch(wrong, np.arange(5), (1,))


def digits_config(*overrides: str):
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)


@compiled
def test_the_config_chooses_and_both_give_the_same_batches(caplog):
    found = {}
    for name in ("batch", "reference"):
        config = digits_config(f"DATA.PIPELINE={name}")
        loaders = build_train_loader(config), build_eval_loader(config, "test")
        assert {type(loader.transform) for loader in loaders} == {BatchPipeline if name == "batch" else Pipeline}
        found[name] = [next(loaders[0].epoch(1, 2))[0], *(images for images, _ in loaders[1])]
    np.testing.assert_equal(found["batch"], found["reference"])
    assert digits_config().DATA.PIPELINE == "batch"
    with pytest.raises(UserError, match=r"DATA\.PIPELINE is 'bath', expected one of batch, reference"):
        digits_config("DATA.PIPELINE=bath")


@compiled
def test_what_it_cannot_do_is_left_to_the_reference():
    for reason, changes in {"bicubic interpolation": {"INTERPOLATION": "bicubic"}, "hue jitter": {"HUE": 0.1}}.items():
        with pytest.raises(Unsupported, match=reason):
            BatchPipeline(build_train_transforms(augment(**changes), 32))
    resize = Resize((32, 32))
    for steps in [(MEANS,), (resize,), (resize, MEANS, RandomRotation(3)), (resize, resize, MEANS), (MEANS, resize),
                  (RandomCrop(4), MEANS), (resize, MEANS, MEANS), (resize, object(), MEANS)]:
        with pytest.raises(Unsupported, match="transforms in the order"):
            BatchPipeline(Pipeline(steps, (32, 32)))
    with pytest.raises(Unsupported, match="rows of 28 pixels"):
        BatchPipeline(build_train_transforms(augment(), 28))


def test_without_compiled_operators_the_reference_runs_and_the_log_says_why(caplog):
    with kernels.using("stock"), caplog.at_level("INFO", "suite"):
        loader = build_train_loader(digits_config())
    assert type(loader.transform) is Pipeline
    assert "one by one, as with DATA.PIPELINE reference: stock operators were asked for" in caplog.text


@compiled
def test_a_machine_with_other_pixels_gets_the_reference(monkeypatch):
    other = (batch.RESIZED_CROP, 0.1, 0.5, 0.0, 0.0, 1.0, 1.0)
    monkeypatch.setitem(batch._STEPS, Resize, lambda transform, *size: other)
    with pytest.raises(Unsupported, match="it gives other pixels than the reference on this machine"):
        BatchPipeline(build_eval_transforms(augment(), 32))


def test_memory_is_used_again_when_its_last_view_is_gone_and_never_before():
    memory = Memory()
    first = memory.array((4, 3, 5))
    place = first.ctypes.data
    first[:] = 7
    view = first[2:]
    del first
    gc.collect()
    other = memory.array((4, 3, 5))
    other[:] = 8
    assert (view == 7).all() and other.ctypes.data != place
    del view
    assert memory.array((2, 3, 5)).ctypes.data == place
    assert memory.array((40, 3, 5)).shape == (40, 3, 5)  # larger than what is kept
    held = [memory.array((4,)) for _ in range(3 * KEPT)]
    del held
    assert len(memory._free) <= KEPT


@compiled
def test_batches_of_many_threads_do_not_disturb_each_other():
    pipeline = build_train_transforms(augment(), 32)
    by_batch, images = BatchPipeline(pipeline), np.stack(pictures(40))
    expected = [by_batch.batch(images, np.arange(40), (epoch,)).copy() for epoch in range(6)]

    def work(thread: int) -> None:
        for turn in range(20):
            epoch = (turn + thread) % 6
            np.testing.assert_array_equal(by_batch.batch(images, np.arange(40), (epoch,)), expected[epoch])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread has raised


@compiled
def test_it_is_much_faster_and_leaves_the_interpreter_free():
    """A floor that a busy machine reaches too; docs/PERFORMANCE.md has the ratios."""
    pipeline = build_train_transforms(augment(**RECIPES["convmixer"]), 32)
    by_batch, images = BatchPipeline(pipeline), np.stack(pictures(8)).repeat(16, axis=0)
    seconds = {}
    for name, one in (("reference", pipeline), ("batch", by_batch)):
        started = time.thread_time()
        for epoch in range(3):
            one.batch(images, np.arange(128), (epoch,))
        seconds[name] = time.thread_time() - started
    assert seconds["batch"] < seconds["reference"] / 5

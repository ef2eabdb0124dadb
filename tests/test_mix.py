"""Mixup and CutMix: what is done to a batch, and how it is drawn."""

from __future__ import annotations

import math

import numpy as np

from datasets.loader import BatchMix, Mix, mix_images, mix_labels


def test_mixup_and_cutmix_do_what_they_drew():
    images = np.random.default_rng(1).normal(size=(6, 3, 8, 10)).astype(np.float32)
    labels = np.array([0, 1, 2, 2, 1, 0])
    np.testing.assert_allclose(
        mix_images(images, Mix(0.3)), 0.3 * images + 0.7 * np.flip(images, 0), rtol=1e-6, atol=1e-6
    )
    mixed = mix_images(images, Mix(1 - 12 / 80, (2, 5, 3, 7)))
    inside = np.zeros((8, 10), bool)
    inside[2:5, 3:7] = True
    np.testing.assert_array_equal(mixed[..., inside], images[::-1][..., inside])
    np.testing.assert_array_equal(mixed[..., ~inside], images[..., ~inside])
    targets = mix_labels(labels, 4, Mix(0.3))
    expected = [0.3 * np.eye(4)[a] + 0.7 * np.eye(4)[b] for a, b in zip(labels, labels[::-1], strict=True)]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert targets.dtype == np.float32
    assert mix_images(images, Mix(1.0)) is images
    np.testing.assert_array_equal(mix_labels(labels, 4, Mix(1.0)), np.eye(4)[labels])


def test_mixing_draws_follow_timms_rules():
    both = BatchMix(mixup=0.8, cutmix=1.0, prob=0.9, switch_prob=0.4)
    drawn = [both.draw(42, iteration, 32, 48) for iteration in range(6000)]
    assert drawn[:50] == [both.draw(42, iteration, 32, 48) for iteration in range(50)]
    plain = sum(mix == Mix(1.0) for mix in drawn)
    cut = [mix for mix in drawn if mix.box]
    mixed = [mix.ratio for mix in drawn if not mix.box and mix.ratio < 1]
    assert abs(plain - 600) < 4.5 * math.sqrt(6000 * 0.9 * 0.1) + 5  # a few empty boxes are plain too
    assert abs(len(cut) - 6000 * 0.9 * 0.4) < 4.5 * math.sqrt(6000 * 0.36 * 0.64)
    assert abs(np.mean(mixed) - 0.5) < 0.03
    assert abs(np.var(mixed) - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(0.8, 0.8)
    for mix in cut:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 48
        assert mix.ratio == 1 - (bottom - top) * (right - left) / (32 * 48)
    assert all(BatchMix().draw(1, i, 32, 32) == Mix(1.0) for i in range(20))
    assert all(BatchMix(cutmix=1.0).draw(1, i, 32, 32).box for i in range(20))
    assert not any(BatchMix(mixup=0.8).draw(1, i, 32, 32).box for i in range(20))

"""InterpretDL's LIME on today's packages, against what it is defined to compute."""

import types
from functools import partial
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from test_explain import Convolutions, FromImageNet, image_model, picture

from analysis.explain.lime import load_interpretdl, superpixels
from analysis.explain.methods import explain
from datasets.digits import read as read_digits
from errors import UserError
from processes import python

if find_spec("interpretdl") is None:
    pytest.skip("requirements-explain.txt is not installed", allow_module_level=True)


def test_weights_are_those_of_an_independent_computation() -> None:
    """The same perturbations made one by one, InterpretDL's kernel, and the normal equations."""
    network, image, samples = Convolutions(), picture(), 300
    model = image_model(network)
    segments = superpixels(image, 12)
    count = int(segments.max()) + 1
    label = int(model.probabilities_of(image).argmin())
    found = explain(model, image, "lime", label, num_samples=samples, segments=segments, seed=5)

    masks = np.random.RandomState(5).randint(0, 2, samples * count).reshape(samples, count)
    masks[0] = 1
    hidden = image.copy()
    for number in range(count):
        hidden[segments == number] = image[segments == number].mean(0)
    probabilities = [model.probabilities_of(np.where(mask[segments][..., None] == 1, image, hidden)) for mask in masks]
    distances = 1 - np.sqrt(masks.sum(1) / count)  # the cosine distance of a mask to the mask of ones
    kernel = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    columns = np.concatenate([masks, np.ones((samples, 1))], axis=1)  # the last coefficient is the intercept
    for row, index in enumerate(found.classes):
        values = np.array(probabilities, np.float64)[:, index]
        expected = np.linalg.solve(columns.T @ (kernel[:, None] * columns), columns.T @ (kernel * values))
        largest = np.abs(expected[:-1]).max()
        np.testing.assert_allclose(found.arrays["weights"][row], expected[:-1], rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(found.arrays["intercept"][row], expected[-1], rtol=1e-5)
        assert found.arrays["score"][row] > 0.5
    assert found.classes == (int(found.probabilities.argmax()), label)


def test_weights_are_those_of_the_loop_of_interpretdl() -> None:
    """The batches, the deduplication and the direct normalisation change nothing but the time."""
    from sklearn.linear_model import LinearRegression

    network, image, samples = Convolutions(), picture(1), 200
    model = image_model(network, "AUGMENT.MEAN=[0.4, 0.5, 0.6]", "AUGMENT.STD=[0.2, 0.3, 0.25]")
    segments = superpixels(image, 8)
    found = explain(model, image, "lime", num_samples=samples, segments=segments, seed=3)
    interpreter = load_interpretdl().LIMECVInterpreter(FromImageNet(network, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
                                                       device="cpu", random_seed=3)
    lime = interpreter.lime_base
    lime.segments = segments
    lime.interpret_instance = partial(lime.interpret_instance, model_regressor=LinearRegression())
    theirs = interpreter.interpret(image, num_samples=samples, batch_size=50, visual=False)
    expected = np.array([weight for _, weight in sorted(theirs[found.classes[0]])])
    assert list(theirs) == list(found.classes)
    np.testing.assert_allclose(found.arrays["weights"][0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_equal_masks_are_computed_once() -> None:
    network, image, hidden = Convolutions(), picture(), picture(1)
    model = image_model(network)
    segments = np.zeros((32, 32), np.int64)
    segments[:, 10:20], segments[16:, 20:] = 1, 2
    masks = np.random.default_rng(0).integers(0, 2, (500, 3))
    model.batch_size = 3
    found = model.region_probabilities(image, hidden, segments, masks)
    assert network.seen == 8
    images = np.where(masks[:20, segments][..., None], image, hidden)
    np.testing.assert_allclose(found[:20], [model.probabilities_of(one) for one in images], atol=1e-6)


def test_superpixels_are_those_of_the_source_at_224_and_enough_at_32() -> None:
    from skimage.segmentation import quickshift

    large = cv2.resize(picture(2), (224, 224), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(superpixels(large), quickshift(large, sigma=1))
    for digit in read_digits("test").images[:3]:
        small = cv2.resize(digit, (32, 32), interpolation=cv2.INTER_LINEAR)
        found = superpixels(small)
        assert found.shape == (32, 32)
        assert np.unique(found).tolist() == list(range(found.max() + 1))
        assert found.max() + 1 >= 15 > 2 * (quickshift(small, sigma=1).max() + 1)
    assert 8 <= superpixels(picture(2), 12).max() + 1 <= 20


def test_fewer_samples_than_superpixels_are_refused() -> None:
    segments = superpixels(picture(), 12)
    with pytest.raises(UserError, match=f"10 samples, expected more than the {segments.max() + 1} superpixels"):
        explain(image_model(Convolutions()), picture(), "lime", num_samples=10, segments=segments)


def test_display_is_lent_for_the_import_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython 9 has no ``display`` in ``IPython.core.display``; InterpretDL finds one there, and leaves none."""
    old_module = types.ModuleType("IPython.core.display")
    monkeypatch.setattr("IPython.core.display", old_module)
    seen = []
    monkeypatch.setattr("analysis.explain.lime.importlib.import_module",
                        lambda name: seen.append(callable(old_module.display)))
    load_interpretdl()
    assert seen == [True] and not hasattr(old_module, "display")


def test_nothing_needs_interpretdl_until_it_is_used() -> None:
    program = ("import sys\nfor name in ('interpretdl', 'skimage', 'IPython'): sys.modules[name] = None\n"
               "import analysis.explain.methods, analysis.explain.gallery\n"
               "from analysis.explain.lime import load_interpretdl\n"
               "from errors import UserError\n"
               "try: load_interpretdl()\nexcept UserError as error: print(error)\n")
    printed = python(program)
    assert "pip install --no-deps interpretdl==0.8.0" in printed and "\n" not in printed.strip()

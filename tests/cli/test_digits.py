"""The built-in task: its data, its gradient, and that it can be learned."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

import gradstep as gs
from gradstep.cli.race.digits import MOVES, Digits, backward


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_gradient_agrees_with_central_differences_in_float64():
    task = Digits(hidden=7, dtype=np.float64)
    params = task.init(3)
    rng = np.random.default_rng(0)
    for array in params.values():
        array += 0.1 * rng.normal(size=array.shape)
    images, labels = task.train_images[:20], task.train_labels[:20]
    _, grads = backward(params, images, labels)
    assert grads.keys() == params.keys()
    h = 1e-6
    for name, array in params.items():
        for index in rng.choice(array.size, size=min(array.size, 40), replace=False):
            place = np.unravel_index(index, array.shape)
            value = array[place]
            array[place] = value + h
            above, _ = backward(params, images, labels)
            array[place] = value - h
            below, _ = backward(params, images, labels)
            array[place] = value
            assert grads[name][place] == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-9)


def test_loss_of_an_ignorant_network_is_that_of_guessing(digits: Digits):
    params = {name: np.zeros_like(array) for name, array in digits.init(0).items()}
    loss, _ = digits.loss_and_grads(params, 0, np.random.default_rng(0))
    assert loss == pytest.approx(np.log(10), rel=1e-6)


def test_images_are_sklearns_split_without_overlap(digits: Digits):
    originals = len(digits.train_labels) // len(MOVES)
    assert originals + len(digits.test_labels) == len(load_digits().target) == 1797
    train = {image.tobytes() for image in digits.train_images[:originals]}
    test = {image.tobytes() for image in digits.test_images}
    assert len(train | test) == 1797
    counts = np.bincount(digits.train_labels) + len(MOVES) * 0
    assert np.bincount(digits.test_labels).min() > 20
    assert counts.min() > 100


def test_copies_are_moved_by_one_pixel(digits: Digits):
    originals = len(digits.train_labels) // len(MOVES)
    copies = digits.train_images.reshape(len(MOVES), originals, 8, 8)
    for copy, (y, x) in zip(copies, MOVES, strict=True):
        inner = copies[0][:, 1:7, 1:7]
        np.testing.assert_array_equal(copy[:, 1 - y : 7 - y, 1 - x : 7 - x], inner)


def test_same_seed_gives_the_same_start_and_the_same_batches(digits: Digits):
    first, second, other = digits.init(1), digits.init(1), digits.init(2)
    losses = [digits.loss_and_grads(first, 0, np.random.default_rng(seed))[0] for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert not np.array_equal(first["hidden.weight"], other["hidden.weight"])
    assert all(array.dtype == np.float32 for array in first.values())


def test_it_can_be_learned(digits: Digits):
    params, rng = digits.init(0), np.random.default_rng(0)
    before = digits.evaluate(params)
    optimizer = gs.Adam(3e-3, bias_correction=True)
    for step in range(300):
        _, grads = digits.loss_and_grads(params, step, rng)
        optimizer.apply_gradients(grads, params)
    after = digits.evaluate(params)
    assert before["test accuracy"] < 0.3
    assert after["test accuracy"] > 0.93
    assert after["test loss"] < before["test loss"] / 5

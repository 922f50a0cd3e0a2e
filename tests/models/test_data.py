"""Tests models/common/data.py: the data sets, missing data, and the cache."""

import errno
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from models.common import data
from models.common.errors import UserError


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar10", (50_000, 10_000, 32, 3)), ("mnist", (60_000, 10_000, 28, 1))]
)
def test_real_data(data_dir, name, shape):
    images = data.load(name, str(data_dir))
    train, test, size, channels = shape
    assert images.train_images.shape == (train, size, size, channels)
    assert images.test_images.shape == (test, size, size, channels)
    assert images.train_images.dtype == np.uint8
    np.testing.assert_array_equal(np.unique(images.train_labels), np.arange(10))
    assert len(images.test_labels) == test
    again = data.load(name, str(data_dir))
    np.testing.assert_array_equal(images.train_labels, again.train_labels)


@pytest.mark.parametrize(
    ("name", "shape"), [("synthetic_cifar10", (32, 32, 3)), ("synthetic_mnist", (28, 28, 1))]
)
def test_synthetic_images_need_no_files_and_say_so(name, shape):
    one, two = data.load(name), data.load(name)
    np.testing.assert_array_equal(one.train_images, two.train_images)
    assert one.train_images.shape == (1000, *shape)
    assert one.test_images.shape == (200, *shape)
    assert "synthetic" in one.caveat


@pytest.mark.usefixtures("offline")
def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(UserError) as error:
        data.load("cifar10", str(tmp_path))
    assert f"cifar10 is not in {tmp_path}" in str(error.value)
    assert "no network" in str(error.value)
    assert f"`tfds build cifar10 --data_dir {tmp_path}`" in str(error.value)
    assert "--preset smoke (--dataset synthetic_cifar10)" in str(error.value)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="there is no such folder") as error:
        data.load("mnist", str(tmp_path / "absent"))
    assert f"`tfds build mnist --data_dir {tmp_path / 'absent'}`" in str(error.value)
    assert "--preset smoke (--dataset synthetic_mnist)" in str(error.value)


def test_an_unknown_data_set_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean cifar10"):
        data.load("cifar")


def test_damaged_data_are_named(tmp_path, data_dir):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for path in (data_dir / "mnist" / "3.0.1").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[:9000] if "tfrecord" in path.name else content)
    with pytest.raises(UserError, match="damaged"):
        data.load("mnist", str(tmp_path))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def call(source):
        return data.cached("square", source, lambda: calls.append(1) or {"y": source**2})["y"]

    call.calls, call.folder = calls, tmp_path / "tfwn"
    return call


def test_the_cache_makes_each_result_once(cache):
    for source in (np.arange(5), np.arange(5), np.arange(6)):
        np.testing.assert_array_equal(cache(source), source**2)
    assert len(cache.calls) == 2


def test_a_damaged_cache_is_made_again(cache):
    cache(np.arange(5))
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(cache(np.arange(5)), np.arange(5) ** 2)
    np.testing.assert_array_equal(cache(np.arange(5)), np.arange(5) ** 2)
    assert len(cache.calls) == 2


def test_a_full_disk_leaves_nothing_in_the_cache(cache, monkeypatch):
    def savez(path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    np.testing.assert_array_equal(cache(np.arange(5)), np.arange(5) ** 2)
    assert not list(cache.folder.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.folder.write_text("a file where the folder should be")
    np.testing.assert_array_equal(cache(np.arange(5)), np.arange(5) ** 2)

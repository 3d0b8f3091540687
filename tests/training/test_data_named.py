"""The sets known by name, in the form that their own readers want."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from rlsearch.errors import DataError
from rlsearch.training.data import DataSpec, load_data, load_test


def write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    content = head + values.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(root: Path, packed: bool = True, name: str = "MNIST") -> tuple[np.ndarray, np.ndarray]:
    """40 training images and 10 test images; gives the training images and labels."""
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    labels = np.arange(50) % 10
    folder = root / name / "raw"
    for prefix, part in (("train", slice(0, 40)), ("t10k", slice(40, 50))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[part], packed)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels[part], packed)
    return images[:40], labels[:40]


def test_digits_have_a_fixed_test_split() -> None:
    first, second = load_data(DataSpec("digits")), load_data(DataSpec("digits", seed=1))
    test = load_test(DataSpec("digits", seed=5))
    assert (len(first.train.labels), len(first.validation.labels), len(test.labels)) == (1294, 144, 359)
    assert first.train.images.shape[1:] == (1, 8, 8)
    assert (first.crop, first.flip, first.num_classes) == (1, False, 10)
    assert first.train.images.max() == 255
    together = [np.concatenate([d.train.images, d.validation.images]).reshape(-1, 64) for d in (first, second)]
    assert {image.tobytes() for image in together[0]} == {image.tobytes() for image in together[1]}
    assert not {image.tobytes() for image in together[0]} & {image.tobytes() for image in test.images}
    assert not np.array_equal(first.validation.images, second.validation.images)
    counts = [np.bincount(labels).tolist() for labels in (test.labels, first.validation.labels)]
    assert all(max(count) - min(count) <= 2 for count in counts)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder", "flip"), [("mnist", "MNIST", False), ("fashionmnist", "FashionMNIST", True)]
)
def test_idx_files_are_read_packed_or_not(tmp_path: Path, packed: bool, name: str, folder: str, flip: bool) -> None:
    images, labels = write_mnist(tmp_path, packed, folder)
    data = load_data(DataSpec(name, root=str(tmp_path), validation_fraction=0.25))
    found = np.concatenate([data.train.images, data.validation.images])
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found_labels = np.concatenate([data.train.labels, data.validation.labels])
    assert {image.tobytes(): label for image, label in zip(found, found_labels, strict=True)} == known
    assert (data.flip, data.crop, data.input_shape, len(data.classes)) == (flip, 2, (3, 28, 28), 10)
    assert load_test(DataSpec(name, root=str(tmp_path))).labels.tolist() == list(range(10))


def test_faults_of_idx_files_are_named(tmp_path: Path) -> None:
    mnist = DataSpec("mnist", root=str(tmp_path))
    with pytest.raises(DataError, match=r"data set 'mnist' was not found.*set data.download to true.*or data.root"):
        load_data(mnist)
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read, it may be truncated"):
        load_data(mnist)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match=r"is truncated: 31359 values for shape \(40, 28, 28\)"):
        load_data(mnist)
    images.write_bytes(gzip.compress(b"\0\0\x0b\x03" + bytes(40)))
    with pytest.raises(DataError, match="is no idx file of uint8 with 3 axes"):
        load_data(mnist)
    images.write_bytes(whole)
    write_idx(images.with_name("train-labels-idx1-ubyte"), np.arange(40) % 11, packed=False)
    with pytest.raises(DataError, match=r"train label 10 at row 10 is out of range, it must be in \[0, 9\]"):
        load_data(mnist)
    write_idx(images.with_name("train-labels-idx1-ubyte"), np.arange(39) % 10, packed=False)
    with pytest.raises(DataError, match="40 train images but 39 labels"):
        load_data(mnist)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CIFAR-10 of 4 training images a file, which torchvision's reader takes for its own: checksums included."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    files = {f"data_batch_{n + 1}": {"data": pixels[n], "labels": [0, 1, 0, 1]} for n in range(5)}
    files["test_batch"] = {"data": pixels[5], "labels": [9, 8, 7, 6]}
    files["batches.meta"] = {"label_names": [f"class{n}" for n in range(10)]}
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    reader = torchvision.datasets.CIFAR10
    monkeypatch.setattr(reader, "train_list", [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)])
    monkeypatch.setattr(reader, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums["batches.meta"]})
    return pixels.reshape(24, 3, 32, 32)


def test_cifar10_comes_through_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    cifar = DataSpec("cifar10", root=str(tmp_path))
    data = load_data(cifar)
    found = {image.tobytes() for split in (data.train, data.validation) for image in split.images}
    assert found == {image.tobytes() for image in pixels[:20]}
    assert data.classes == tuple(f"class{n}" for n in range(10))
    assert (data.flip, data.crop, data.input_shape) == (True, 4, (3, 32, 32))
    test = load_test(cifar)
    assert test.images.tobytes() == pixels[20:].tobytes()
    assert test.labels.tolist() == [9, 8, 7, 6]
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": pixels, "labels": []}))
    with pytest.raises(DataError, match="'cifar10' was not found, or is damaged"):
        load_data(cifar)


def test_svhn_comes_through_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": (np.arange(20) % 10 + 1)[:, None]})
    checksum = hashlib.md5((tmp_path / "train_32x32.mat").read_bytes()).hexdigest()
    splits = torchvision.datasets.SVHN.split_list
    monkeypatch.setitem(splits, "train", [splits["train"][0], "train_32x32.mat", checksum])
    data = load_data(DataSpec("svhn", root=str(tmp_path)))
    found = np.concatenate([data.train.images, data.validation.images])
    assert {image.tobytes() for image in found} == {pixels[..., n].transpose(2, 0, 1).tobytes() for n in range(20)}
    assert sorted(np.concatenate([data.train.labels, data.validation.labels])) == sorted([*range(10)] * 2)
    assert (data.flip, data.classes[3]) == (False, "3")


def test_stl10_comes_through_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
    files = {
        "train_X.bin": pixels.transpose(0, 1, 3, 2).tobytes(),
        "train_y.bin": (np.arange(20) % 10 + 1).astype(np.uint8).tobytes(),
        "class_names.txt": "\n".join(f"class{n}" for n in range(10)).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = [[name, hashlib.md5(files[name]).hexdigest()] for name in ("train_X.bin", "train_y.bin")]
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", sums)
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [])
    data = load_data(DataSpec("stl10", root=str(tmp_path), image_size=48))
    assert data.train.images.shape == (18, 3, 48, 48)
    assert (data.flip, data.crop, data.classes[1]) == (True, 6, "class1")
    whole = load_data(DataSpec("stl10", root=str(tmp_path)))
    found = {image.tobytes() for split in (whole.train, whole.validation) for image in split.images}
    assert found == {image.tobytes() for image in pixels}


def test_imagenette_takes_the_smallest_size_that_will_do(tmp_path: Path) -> None:
    for suffix, side in (("-160", 160), ("-320", 320)):
        for split in ("train", "val"):
            for wnid in ("n01440764", "n02102040"):
                folder = tmp_path / f"imagenette2{suffix}" / split / wnid
                folder.mkdir(parents=True)
                for index in range(3):
                    Image.new("RGB", (side + 40, side), (side // 2, index, 0)).save(folder / f"{index}.JPEG")
    data = load_data(DataSpec("imagenette", root=str(tmp_path)))
    assert data.input_shape == (3, 128, 128)
    assert abs(int(data.train.images[0, 0, 0, 0]) - 80) < 3
    large = load_data(DataSpec("imagenette", root=str(tmp_path), image_size=224))
    assert abs(int(large.train.images[0, 0, 0, 0]) - 160) < 3
    assert load_test(DataSpec("imagenette", root=str(tmp_path))).images.shape == (6, 3, 128, 128)
    with pytest.raises(DataError, match=r"'imagenette' was not found.* at .*imagenette2; set data.download"):
        load_data(DataSpec("imagenette", root=str(tmp_path), image_size=400))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "fashionmnist", "imagenette"])
def test_missing_sets_say_how_to_get_them_and_nothing_is_fetched(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"'{name}' was not found.*set data.download to true to fetch it there, or data"
    ):
        load_data(DataSpec(name, root=str(tmp_path / "empty")))
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenette"])
def test_a_fetch_that_fails_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data set '\w+' cannot be fetched into .*file"):
        load_data(DataSpec(name, root=str(tmp_path / "file"), download=True))

"""Made-up CIFAR, SVHN and ImageNet: files of the published form with a few random images, and their descriptions.

The readers accept the published files only, by their digests. A test that trains on made-up files therefore replaces
what is published too: `write_all(folder)` writes the files, `publish(monkeypatch, sources)` has readers expect them.
"""

import hashlib
import pickle
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from stochastic_depth_lab.data import cifar, imagenet, svhn
from stochastic_depth_lab.data.cifar import CifarSource
from stochastic_depth_lab.data.published import PublishedFile
from stochastic_depth_lab.data.svhn import SvhnSource


@dataclass(frozen=True)
class Sources:
    cifar10: CifarSource
    cifar100: CifarSource
    svhn: SvhnSource


def write_all(folder: Path) -> Sources:
    """Training, validation and test images: CIFAR-10 240, 60, 60; CIFAR-100 340, 60, 400; SVHN 150, 60, 100; ImageNet
    18 for training and validation, 9 for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder / "imagenet" / "train", pictures_per_class=6)
    write_pictures(folder / "imagenet" / "val", pictures_per_class=3)
    return Sources(
        cifar10=write_cifar(folder, cifar.CIFAR10, images_per_file=60),
        cifar100=write_cifar(folder, cifar.CIFAR100, images_per_file=400),
        svhn=write_svhn(folder, svhn.SVHN),
    )


def publish(monkeypatch: pytest.MonkeyPatch, sources: Sources) -> None:
    """Until the end of the test, readers accept these files as the published ones."""
    monkeypatch.setattr(cifar, "CIFAR10", sources.cifar10)
    monkeypatch.setattr(cifar, "CIFAR100", sources.cifar100)
    monkeypatch.setattr(svhn, "SVHN", sources.svhn)
    monkeypatch.setattr(imagenet, "NUM_VALIDATION", 6)


def write_cifar(folder: Path, source: CifarSource, *, images_per_file: int) -> CifarSource:
    """Writes the source's folder with random images of all classes; the source that describes it."""
    (folder / source.folder).mkdir(exist_ok=True)
    digests: dict[str, str] = {}
    for seed, name in enumerate([*source.train_files, *source.test_files]):
        labels = [index % source.num_classes for index in range(images_per_file)]
        data = random_images(images_per_file, seed).reshape(images_per_file, -1)
        digests[name] = write(folder / source.folder / name, pickled({"data": data, source.labels_key: labels}))
    (meta,) = source.meta_file
    names = [f"class {index}" for index in range(source.num_classes)]
    digests[meta] = write(folder / source.folder / meta, pickled({source.names_key: names}))
    return replace(
        source,
        train_files={name: digests[name] for name in source.train_files},
        test_files={name: digests[name] for name in source.test_files},
        meta_file={meta: digests[meta]},
        validation=60,
    )


def write_archive(folder: Path, source: CifarSource) -> CifarSource:
    """Packs the source's folder as its authors do; the source that describes the archive."""
    path = folder / source.archive.name
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / source.folder, source.folder)
    return replace(source, archive=described(path, source.archive))


def write_svhn(folder: Path, source: SvhnSource) -> SvhnSource:
    """Writes the three files with random images of all classes; the source that describes them."""
    files: dict[str, PublishedFile] = {}
    for seed, (part, num_images) in enumerate({"train": 120, "extra": 90, "test": 100}.items()):
        published: PublishedFile = getattr(source, part)
        digits = np.arange(num_images, dtype=np.uint8).reshape(-1, 1) % 10 + 1
        pixels = random_images(num_images, seed).transpose(2, 3, 1, 0)
        savemat(folder / published.name, {"X": pixels, "y": digits}, do_compression=True)
        files[part] = described(folder / published.name, published)
    return replace(source, **files, validation=60)


def write_pictures(folder: Path, *, pictures_per_class: int) -> None:
    """Writes three folders of JPEGs of several sizes, one color per class, and one gray picture."""
    for label, name in enumerate(("n01", "n02", "n03")):
        (folder / name).mkdir(parents=True)
        for number in range(pictures_per_class):
            drawn = np.random.default_rng((label, number))
            pixels = drawn.integers(0, 128, (90 + 10 * number, 120 - 10 * number, 3), dtype=np.uint8)
            pixels[..., label] += 127
            picture = Image.fromarray(pixels)
            if (label, number) == (0, 0):
                picture = picture.convert("L")
            picture.save(folder / name / f"{number}.JPEG")


def described(path: Path, published: PublishedFile) -> PublishedFile:
    return replace(published, num_bytes=path.stat().st_size, md5=hashlib.md5(path.read_bytes()).hexdigest())


def random_images(num_images: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)


def write(path: Path, content: bytes) -> str:
    """Writes a file; its MD5."""
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def pickled(content: dict[str, object]) -> bytes:
    """A pickle of today's Python and numpy, for what CIFAR's authors pickled with Python 2."""
    return pickle.dumps(content, protocol=4)

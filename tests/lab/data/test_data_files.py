"""CIFAR and SVHN from their authors' files: what is right is read, what is not is refused in one line."""

import contextlib
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import made_up_data
import numpy as np
import pytest
import torch
from scipy.io import savemat

from stochastic_depth_lab.data import DataError, Normalisation, cifar, default_data_root, load, published, svhn
from stochastic_depth_lab.data.published import PublishedFile

PIXELS = np.zeros((2, 3072), np.uint8)


def refused(function: Callable[[], object]) -> str:
    """The message of the DataError that a call must raise, which must be one line."""
    with pytest.raises(DataError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_real_cifar10(cifar10_root: Path) -> None:
    data = load("cifar10", data_root=cifar10_root)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert " ".join(data.class_names) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert (data.train.labels.bincount() + data.validation.labels.bincount()).tolist() == [5000] * 10
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    # Known to everybody who trains on CIFAR-10: mean 0.4914 0.4822 0.4465, deviation 0.247 0.243 0.261 (all 50,000).
    fitted = Normalisation.fit(torch.cat([data.train.images, data.validation.images]), "channel")
    torch.testing.assert_close(fitted.mean.flatten() / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-5, rtol=0)
    torch.testing.assert_close(fitted.std.flatten() / 255, torch.tensor([0.2470, 0.2435, 0.2616]), atol=5e-5, rtol=0)


def test_real_cifar10_is_what_a_plain_unpickler_reads(cifar10_root: Path) -> None:
    content = (cifar10_root / "cifar-10-batches-py" / "test_batch").read_bytes()
    split = cifar.read_batch(content, "labels", 10, "test_batch")
    batch = pickle.loads(
        content.replace(b"U\x02u1K\x00K\x01", b"U\x02u1\x89\x88"), encoding="latin1"
    )  # numpy 2.4 warns
    assert np.array_equal(split.images.numpy(), batch["data"].reshape(-1, 3, 32, 32))
    assert split.labels.tolist() == batch["labels"]


def test_real_piece_of_svhn(svhn_piece: Path) -> None:
    split = svhn.read_file(svhn_piece)
    assert split.images.shape == (1083, 3, 32, 32)
    assert split.labels[:9].tolist() == [1, 9, 2, 3, 2, 5, 9, 3, 3]  # the house numbers 19, 23, 25, 93, 3...
    from scipy.io import loadmat

    source = loadmat(svhn_piece)
    assert np.array_equal(split.images[5].permute(1, 2, 0).numpy(), source["X"][:, :, :, 5])
    assert torch.equal(split.labels, torch.from_numpy(source["y"][:, 0].astype(np.int64) % 10))


# --- made-up files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("cifar10", (240, 60, 60)), ("cifar100", (340, 60, 400)), ("svhn", (150, 60, 100))],
)
def test_made_up_data_is_read(made_up_data_root: Path, name: str, sizes: tuple[int, int, int]) -> None:
    data = load(name)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert data.num_classes == (100 if name == "cifar100" else 10)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_validation_is_drawn_by_its_seed_and_nothing_is_lost(made_up_data_root: Path, name: str) -> None:
    first, second = load(name), load(name, split_seed=1)
    assert not torch.equal(first.validation.images, second.validation.images)
    assert torch.equal(first.test.images, second.test.images)

    def fingerprints(*parts: torch.Tensor) -> list[tuple[int, ...]]:
        return sorted(tuple(row) for row in torch.cat(parts).flatten(1)[:, :8].tolist())

    whole = fingerprints(first.train.images, first.validation.images)
    assert len(set(whole)) == len(whole)
    assert whole == fingerprints(second.train.images, second.validation.images)


def test_cifar_images_keep_their_labels(made_up_data_root: Path) -> None:
    data = load("cifar10", validation=150)
    source = torch.cat([torch.from_numpy(made_up_data.random_images(60, seed)) for seed in range(5)])
    where = {tuple(image.flatten()[:8].tolist()): index for index, image in enumerate(source)}
    for part in (data.train, data.validation):
        assert len(part) == 150
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            index = where[tuple(image.flatten()[:8].tolist())]
            assert torch.equal(image, source[index])
            assert label == index % 60 % 10


def test_svhn_takes_two_validation_images_of_each_class_from_train_for_one_from_extra(made_up_data_root: Path) -> None:
    data = load("svhn", validation=90)
    assert data.validation.labels.bincount().tolist() == [9] * 10
    extra = {tuple(image.flatten()[:8].tolist()) for image in made_up_data.random_images(90, seed=1)}
    from_extra = [tuple(image.flatten()[:8].tolist()) in extra for image in data.validation.images]
    assert sum(from_extra) == 30
    assert data.validation.labels[torch.tensor(from_extra)].bincount().tolist() == [3] * 10


def test_svhn_images_stand_upright_and_label_10_is_the_digit_0(made_up_data_root: Path) -> None:
    test = load("svhn").test
    assert test.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert np.array_equal(test.images.numpy(), made_up_data.random_images(100, seed=2))


def test_paper_splits() -> None:
    assert cifar.CIFAR10.validation == cifar.CIFAR100.validation == 5000
    assert svhn.SVHN.validation == 6000  # 400 per class from train, 200 per class from extra


@pytest.mark.parametrize("validation", [0, 45, 90 * 3], ids=["none", "no multiple of 30", "too many"])
def test_svhn_refuses_what_it_cannot_divide(made_up_data_root: Path, validation: int) -> None:
    message = refused(lambda: load("svhn", validation=validation))
    assert "multiple of 30" in message or "a class has only 12 images, but validation takes 18" in message


@pytest.mark.parametrize("validation", [0, 300])
def test_cifar_refuses_what_it_cannot_divide(made_up_data_root: Path, validation: int) -> None:
    assert "must be 1..299 images" in refused(lambda: load("cifar10", validation=validation))


# --- folder or archive ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of CIFAR-10, made up, that a test may damage."""
    source = made_up_data.write_cifar(tmp_path, cifar.CIFAR10, images_per_file=60)
    monkeypatch.setattr(cifar, "CIFAR10", source)
    return tmp_path


def test_archive_is_the_same_as_the_folder_and_is_not_unpacked(
    own_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_folder = load("cifar10", data_root=own_cifar)
    monkeypatch.setattr(cifar, "CIFAR10", made_up_data.write_archive(own_cifar, cifar.CIFAR10))
    folder = own_cifar / "cifar-10-batches-py"
    folder.rename(own_cifar / "elsewhere")
    from_archive = load("cifar10", data_root=own_cifar)
    assert torch.equal(from_folder.train.images, from_archive.train.images)
    assert torch.equal(from_folder.test.labels, from_archive.test.labels)
    assert not folder.exists()


def test_archive_cannot_reach_outside(own_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and paths that climb are not followed, even in an archive with the right digest."""
    (own_cifar / "cifar-10-batches-py").rename(own_cifar / "elsewhere")
    path = own_cifar / cifar.CIFAR10.archive.name
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../climbed", str(own_cifar / "absolute")):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(own_cifar / "elsewhere" / "test_batch")
        archive.addfile(link)
    source = replace(cifar.CIFAR10, archive=made_up_data.described(path, cifar.CIFAR10.archive))
    monkeypatch.setattr(cifar, "CIFAR10", source)
    before = sorted(own_cifar.parent.rglob("*"))
    assert "has no file data_batch_1, " in refused(lambda: load("cifar10", data_root=own_cifar))
    assert sorted(own_cifar.parent.rglob("*")) == before


def test_archive_that_is_none_is_refused(own_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cifar / "cifar-10-batches-py").rename(own_cifar / "elsewhere")
    path = own_cifar / cifar.CIFAR10.archive.name
    path.write_bytes(b"no archive")
    source = replace(cifar.CIFAR10, archive=made_up_data.described(path, cifar.CIFAR10.archive))
    monkeypatch.setattr(cifar, "CIFAR10", source)
    assert "no readable .tar.gz" in refused(lambda: load("cifar10", data_root=own_cifar))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "data_batch_3 has MD5 .* truncated or altered. Unpack cifar-10-python.tar.gz again"),
        (alter, "data_batch_3 has MD5 .* truncated or altered. Unpack cifar-10-python.tar.gz again"),
        (Path.unlink, "cifar-10-batches-py has no file data_batch_3. Unpack"),
    ],
    ids=["truncated", "altered", "missing"],
)
def test_damaged_cifar_file_is_refused(own_cifar: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(own_cifar / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(DataError, match=message):
        load("cifar10", data_root=own_cifar)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"extra_32x32.mat has .* bytes instead of .*: it is truncated. Remove it, and the next run downloads it"),
        (alter, "extra_32x32.mat has MD5 .* damaged or altered. Remove it"),
        (Path.unlink, r"extra_32x32.mat does not exist. Fetch http://\S+ \([\d,]+ bytes, MD5 \w{32}\) and put it into"),
    ],
    ids=["truncated", "altered", "missing"],
)
def test_damaged_svhn_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(svhn, "SVHN", made_up_data.write_svhn(tmp_path, svhn.SVHN))
    damage(tmp_path / "extra_32x32.mat")
    with pytest.raises(DataError, match=message):
        load("svhn", data_root=tmp_path, download=False)


def test_a_file_that_may_not_be_read_is_refused(own_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert refused(lambda: load("cifar10", data_root=own_cifar)).endswith("cannot be read: Permission denied.")


# --- pickles ----------------------------------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, eval, np.load, getattr, pickle.loads, np.frombuffer], ids=lambda function: function.__name__
)
def test_pickle_that_calls_anything_is_refused_and_calls_nothing(
    tmp_path: Path, function: Callable[..., object]
) -> None:
    content = pickle.dumps({"data": PIXELS, "labels": [0, 1], "trap": Call(function, f"touch {tmp_path / 'ran'}")})
    message = refused(lambda: cifar.read_batch(content, "labels", 10, "trap"))
    assert message.startswith("trap: not read, UnpicklingError: it asks for ")
    assert "foreign code" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy 1", "numpy 2"])
def test_arrays_of_numpy_1_and_2_are_read(module: bytes, protocol: int) -> None:
    """Protocol 2 with numpy's old name and byte strings is what CIFAR's authors wrote."""
    array = b"c" + module + b"\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    dtype = (
        b"(K\x01(K\x02M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb\x89"
    )
    data = b"T" + (6144).to_bytes(4, "little") + bytes(range(256)) * 24
    content = b"\x80" + bytes([protocol]) + b"}(U\x04data" + array + dtype + data + b"tbU\x06labels](K\x01K\x02eu."
    split = cifar.read_batch(content, "labels", 10, "handmade")
    assert split.labels.tolist() == [1, 2]
    assert split.images[1].flatten().tolist() == list(range(256)) * 12


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": PIXELS, "labels": [0, 10]}, r"label 10 of image 1 is not in 0\.\.9"),
        ({"data": PIXELS, "labels": [-1, 0]}, "label -1 of image 0"),
        ({"data": PIXELS, "labels": [0, 2**70]}, f"label {2**70} of image 1"),
        ({"data": PIXELS, "labels": [0]}, "2 images, but 1 labels"),
        ({"data": PIXELS, "labels": ["a", "b"]}, "'labels' must be a list of integers"),
        ({"data": PIXELS, "fine_labels": [0, 1]}, "'labels' must be a list of integers"),
        ({"data": PIXELS[:, :3000], "labels": [0, 1]}, r"but is bytes \(2, 3000\)"),
        ({"data": PIXELS[:0], "labels": []}, r"but is bytes \(0, 3072\)"),
        ({"data": [0, 1], "labels": [0, 1]}, r"'data' must be bytes \(N, 3072\), but is list"),
        ({"labels": [0, 1]}, "but is NoneType"),
        ({"data": PIXELS.astype(np.float32), "labels": [0, 1]}, "of type 'f4' instead of unsigned bytes"),
        ({"data": np.asfortranarray(np.ones((2, 3072), np.uint8)), "labels": [0, 1]}, "not pickled as numpy does"),
        ([PIXELS, [0, 1]], "holds a list instead of a dictionary"),
    ],
    ids=[
        "label 10", "label -1", "label 2**70", "too few labels", "text labels", "CIFAR-100", "short rows", "empty",
        "a list", "no data", "float32", "Fortran order", "no dictionary",
    ],
)  # fmt: skip
def test_pickles_of_another_form_are_refused(batch: object, message: str) -> None:
    content = pickle.dumps(batch, protocol=4)
    with pytest.raises(DataError, match=f"^it: .*{message}"):
        cifar.read_batch(content, "labels", 10, "it")


@pytest.mark.parametrize("keep", [0, 1, 50, 200, 6000])
def test_truncated_pickles_are_refused(keep: int) -> None:
    content = made_up_data.pickled({"data": PIXELS, "labels": [0, 1]})[:keep]
    assert "it: not read" in refused(lambda: cifar.read_batch(content, "labels", 10, "it"))


def test_an_array_that_promises_more_than_it_holds_is_refused() -> None:
    content = pickle.dumps({"data": PIXELS, "labels": [0, 1]}, protocol=4)
    promised = content.replace(b"K\x02M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86")
    assert promised != content
    # The frame of protocol 4 has grown by the four bytes of the larger number.
    frame = int.from_bytes(content[3:11], "little") + len(promised) - len(content)
    promised = promised[:3] + frame.to_bytes(8, "little") + promised[11:]
    message = refused(lambda: cifar.read_batch(promised, "labels", 10, "it"))
    assert "not pickled as numpy does it" in message


# --- MATLAB files -----------------------------------------------------------------------------------------------------


def mat(path: Path, **variables: Any) -> Path:
    savemat(path, variables, do_compression=True)
    return path


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [11]]}, r"label 11 of image 1 is not in 1\.\.10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[0], [1]]}, "label 0 of image 0"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1]]}, r"it holds X \(32, 32, 3, 2\), y \(1, 1\)"),
        ({"X": np.zeros((2, 3, 32, 32), np.uint8), "y": np.ones((32, 1))}, "no SVHN file"),
        ({"X": np.zeros((32, 32, 3, 2), np.float32), "y": [[1], [2]]}, "X must be uint8 .* float32"),
        ({"Z": np.zeros(3)}, r"it holds Z \(1, 3\)"),
    ],
    ids=["label 11", "label 0", "too few labels", "layout", "float32", "other variables"],
)
def test_mat_files_of_another_form_are_refused(tmp_path: Path, variables: dict[str, Any], message: str) -> None:
    path = mat(tmp_path / "it.mat", **variables)
    with pytest.raises(DataError, match=f"it.mat: .*{message}"):
        svhn.read_file(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_mat_files_are_refused(tmp_path: Path, share: float) -> None:
    path = mat(
        tmp_path / "it.mat", X=made_up_data.random_images(20, 0).transpose(2, 3, 1, 0), y=np.ones((20, 1), np.uint8)
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "it.mat: " in refused(lambda: svhn.read_file(path))


def test_mat_file_that_promises_more_than_it_holds_is_refused_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 7), np.uint8), "y": np.ones((7, 1), np.uint8)}, do_compression=False)
    dimensions = np.array([32, 32, 3, 7], np.int32).tobytes()
    content = path.read_bytes()
    assert dimensions in content
    content = content.replace(dimensions, np.array([32, 32, 3, 500_000_000], np.int32).tobytes())
    content = content.replace(np.array([7, 1], np.int32).tobytes(), np.array([500_000_000, 1], np.int32).tobytes())
    path.write_bytes(content)
    assert "promises 500,000,000 images" in refused(lambda: svhn.read_file(path))


@pytest.mark.filterwarnings("ignore")
def test_damage_that_scipy_only_warns_of_is_refused(tmp_path: Path) -> None:
    images = mat(tmp_path / "images.mat", X=np.zeros((32, 32, 3, 2), np.uint8)).read_bytes()
    labels = mat(tmp_path / "labels.mat", y=[[1], [2]]).read_bytes()
    header_bytes = 128
    path = tmp_path / "it.mat"
    path.write_bytes(images + images[header_bytes:] + labels[header_bytes:])
    assert 'Duplicate variable name "X"' in refused(lambda: svhn.read_file(path))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("kind", [0, 8, 17, 19, 200, 65535])
def test_an_element_of_unknown_type_is_refused_before_scipy_looks_it_up(
    tmp_path: Path, kind: int, compressed: bool
) -> None:
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.ones((1, 1), np.uint8)})
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<II", 2, 3072))  # the tag of X's numbers: unsigned bytes
    content[at : at + 4] = struct.pack("<I", kind)
    if compressed:
        (size,) = struct.unpack_from("<I", content, 132)
        packed = zlib.compress(bytes(content[128 : 136 + size]))
        content[128 : 136 + size] = struct.pack("<II", 15, len(packed)) + packed
    path.write_bytes(content)
    assert "an element has the types 14: [6, 5, 1, " in refused(lambda: svhn.read_file(path))


def test_missing_mat_file_is_named(tmp_path: Path) -> None:
    assert refused(lambda: svhn.read_file(tmp_path / "it.mat")).endswith("it.mat does not exist.")


# --- downloads --------------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the loopback address that serves it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "server"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as running:
        thread = Thread(target=running.serve_forever, args=[0.02])  # seconds between looks at shutdown
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def served_cifar(server: tuple[Path, str]) -> cifar.CifarSource:
    """The archive of a made-up CIFAR-10 lies on the server, and nowhere else."""
    folder, address = server
    source = made_up_data.write_cifar(folder, cifar.CIFAR10, images_per_file=60)
    source = replace(source, archive=replace(source.archive, url=f"{address}/cifar-10-python.tar.gz"))
    return made_up_data.write_archive(folder, source)


def test_missing_archive_is_downloaded_once(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cifar, "CIFAR10", served_cifar(server))
    root = tmp_path / "new" / "root"
    first = load("cifar10", data_root=root)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "cifar-10-python.tar.gz" in streams.err
    assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]
    (server[0] / "cifar-10-python.tar.gz").unlink()
    assert torch.equal(load("cifar10", data_root=root).train.images, first.train.images)


@pytest.mark.parametrize("damage", [cut, alter, Path.unlink], ids=["truncated", "altered", "not there"])
def test_bad_download_leaves_nothing_and_says_what_to_fetch(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    source = served_cifar(server)
    monkeypatch.setattr(cifar, "CIFAR10", source)
    damage(server[0] / "cifar-10-python.tar.gz")
    root = tmp_path / "root"
    message = refused(lambda: load("cifar10", data_root=root))
    assert "could not be downloaded (" in message
    size, md5 = f"{source.archive.num_bytes:,}", source.archive.md5
    assert message.endswith(f"Fetch {source.archive.url} ({size} bytes, MD5 {md5}) and put it into {root}.")
    assert not list(root.iterdir())


class Unreliable(SimpleHTTPRequestHandler):
    """Breaks the connection half-way through every answer that is longer than `holds`; resumes where it is asked to."""

    holds = 0
    status: int | None = None
    asked: ClassVar[list[str | None]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        self.asked.append(self.headers["Range"])
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
        self.send_response(self.status or (206 if first else 200))
        rest = content[first:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who has seen an error does not read on
            self.wfile.write(rest[: self.holds])


@pytest.fixture
def unreliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Unreliable], PublishedFile]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (Unreliable,), {"asked": []})
    content = bytes(range(256)) * 4000
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "file.bin").write_bytes(content)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as running:
        thread = Thread(target=running.serve_forever, args=[0.02])
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}/file.bin"
        yield handler, PublishedFile(address, len(content), hashlib.md5(content).hexdigest())
        running.shutdown()
        thread.join()


def test_of_many_that_miss_a_file_one_downloads_it(
    tmp_path: Path, unreliable: tuple[type[Unreliable], PublishedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, file = unreliable
    handler.holds = file.num_bytes
    root = tmp_path / "root"
    room = iter([file.num_bytes])  # for one
    monkeypatch.setattr(published.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(room, 0)))
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda _: file.in_folder(root, download=True), range(8)))
    assert paths == [root / "file.bin"] * 8
    assert handler.asked == [None]
    assert [entry.name for entry in root.iterdir()] == ["file.bin"]


def test_a_download_that_was_cut_off_goes_on_where_it_was(
    tmp_path: Path, unreliable: tuple[type[Unreliable], PublishedFile]
) -> None:
    handler, file = unreliable
    handler.holds = 400_000
    root = tmp_path / "root"
    for _ in range(2):
        assert "could not be downloaded (" in refused(lambda: file.in_folder(root, download=True))
        assert [path.name for path in root.iterdir()] == ["file.bin.part"]
    path = file.in_folder(root, download=True)
    assert hashlib.md5(path.read_bytes()).hexdigest() == file.md5
    assert [entry.name for entry in root.iterdir()] == ["file.bin"]
    first, second, third = handler.asked
    assert first is None
    assert 0 < int(second[6:-1]) < int(third[6:-1]) <= 800_000


def test_a_part_of_another_file_is_noticed_and_not_kept(
    tmp_path: Path, unreliable: tuple[type[Unreliable], PublishedFile]
) -> None:
    handler, file = unreliable
    handler.holds = file.num_bytes
    root = tmp_path / "root"
    root.mkdir()
    (root / "file.bin.part").write_bytes(b"something else")
    assert "could not be downloaded (ValueError: MD5 hash" in refused(lambda: file.in_folder(root, download=True))
    assert not list(root.iterdir())
    assert file.in_folder(root, download=True).exists()


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_servers_error_is_reported_and_nothing_is_kept_of_it(
    tmp_path: Path, unreliable: tuple[type[Unreliable], PublishedFile], status: int
) -> None:
    handler, file = unreliable
    handler.holds, handler.status = file.num_bytes, status
    message = refused(lambda: file.in_folder(tmp_path / "root", download=True))
    assert f"could not be downloaded (HTTPError: {status}" in message
    assert not list((tmp_path / "root").iterdir())


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nobody = replace(svhn.SVHN.train, url="http://127.0.0.1:1/train_32x32.mat")
    monkeypatch.setattr(svhn, "SVHN", replace(svhn.SVHN, train=nobody))
    message = refused(lambda: load("svhn", data_root=tmp_path / "root"))
    assert "could not be downloaded (ConnectionError" in message
    assert message.endswith(f"(182,040,794 bytes, MD5 {nobody.md5}) and put it into {tmp_path / 'root'}.")


def test_full_disk_is_noticed_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    message = refused(lambda: load("cifar100", data_root=tmp_path))
    assert "needs 169,001,437 bytes, but" in message
    assert "has 1 left" in message


def test_data_root_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "could not be downloaded (NotADirectoryError" in refused(
        lambda: load("cifar10", data_root=tmp_path / "file" / "a")
    )


# --- where ------------------------------------------------------------------------------------------------------------


def test_data_root_is_the_variable_else_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCHASTIC_DEPTH_DATA", str(tmp_path))
    assert default_data_root() == tmp_path
    monkeypatch.delenv("STOCHASTIC_DEPTH_DATA")
    assert default_data_root().name == "stochastic-depth"

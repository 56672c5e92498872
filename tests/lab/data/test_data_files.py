"""CIFAR and SVHN from their authors' files: correct files are read, others are refused in one line."""

import gc
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import ClassVar

import made_up_data
import numpy as np
import pytest
import torch

from stochastic_depth_lab.data import DataError, Normalization, cifar, default_data_root, load, published, svhn
from stochastic_depth_lab.data.published import PublishedFile

PIXELS = np.zeros((2, 3072), np.uint8)
# pooch leaves the connection of a download to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:.*socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _connections_are_collected() -> Iterator[None]:
    yield
    gc.collect()


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
    # Well-known numbers of CIFAR-10: mean 0.4914 0.4822 0.4465, deviation 0.247 0.243 0.261 (all 50,000).
    fitted = Normalization.fit(torch.cat([data.train.images, data.validation.images]), "channel")
    torch.testing.assert_close(fitted.mean.flatten() / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-5, rtol=0)
    torch.testing.assert_close(fitted.std.flatten() / 255, torch.tensor([0.2470, 0.2435, 0.2616]), atol=5e-5, rtol=0)


def test_real_cifar10_is_what_a_plain_unpickler_reads(cifar10_root: Path) -> None:
    content = (cifar10_root / "cifar-10-batches-py" / "test_batch").read_bytes()
    split = cifar.read_batch(content, "labels")
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
        (cut, "extra_32x32.mat has MD5 .* truncated or altered. Remove it, and the next run downloads it"),
        (alter, "extra_32x32.mat has MD5 .* truncated or altered. Remove it"),
        (
            Path.unlink,
            r"extra_32x32.mat does not exist. Download http://\S+ \([\d,]+ bytes, MD5 \w{32}\) and put it",
        ),
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
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for .*, which could run foreign code"):
        cifar.read_batch(content, "labels")
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
    split = cifar.read_batch(content, "labels")
    assert split.labels.tolist() == [1, 2]
    assert split.images[1].flatten().tolist() == list(range(256)) * 12


# --- downloads --------------------------------------------------------------------------------------------------------


def visible(folder: Path) -> list[str]:
    """Its files, but for the lock of downloads."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


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
    """The archive of a made-up CIFAR-10 is only on the server."""
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
    assert "100%" in streams.err
    assert visible(root) == ["cifar-10-python.tar.gz"]
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
    assert message.endswith(f"Download {source.archive.url} ({size} bytes, MD5 {md5}) and put it into {root}.")
    assert not visible(root)


class Counting(SimpleHTTPRequestHandler):
    """Counts the requests, and may answer with an error."""

    status: int | None = None
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.status:
            self.send_error(self.status)
        else:
            super().do_GET()


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Counting], PublishedFile]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (Counting,), {"asked": []})
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


def test_one_of_several_processes_downloads_a_missing_file(
    tmp_path: Path, counting: tuple[type[Counting], PublishedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, file = counting
    root = tmp_path / "root"
    room = iter([file.num_bytes])  # for one
    monkeypatch.setattr(published.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(room, 0)))
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda _: file.in_folder(root, download=True), range(8)))
    assert paths == [root / "file.bin"] * 8
    assert handler.asked == ["/file.bin"]
    assert visible(root) == ["file.bin"]


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_error_is_reported_and_leaves_no_file(
    tmp_path: Path, counting: tuple[type[Counting], PublishedFile], status: int
) -> None:
    handler, file = counting
    handler.status = status
    message = refused(lambda: file.in_folder(tmp_path / "root", download=True))
    assert f"could not be downloaded (HTTPError: {status}" in message
    assert not visible(tmp_path / "root")


def test_without_network_the_error_says_what_to_download_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

"""Files as the authors of a data set publish them: found or downloaded, and verified before anything opens them."""

import fcntl
import hashlib
import os
import shutil
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import pooch
import requests
from requests.exceptions import RequestException
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from stochastic_depth_lab.errors import DataError

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 30
"""How long the server may be silent."""


@dataclass(frozen=True)
class PublishedFile:
    """A file on its authors' server.

    Args:
        url: where it is; the last part is its name on disk too.
        num_bytes: its size.
        md5: its MD5 digest, 32 hexadecimal digits. It is what the authors publish and what tells a damaged file.
    """

    url: str
    num_bytes: int
    md5: str

    @property
    def name(self) -> str:
        """Name of the file, without folders."""
        return self.url.rsplit("/", 1)[-1]

    def in_folder(self, folder: Path, *, download: bool) -> Path:
        """Path of this file in a folder, where it is put if it is not there; its content is the published one.

        A download is complete and verified before it gets its name; progress goes to stderr. What came before a
        connection broke is kept as `NAME.part`, and the next attempt goes on from there. Of several processes that miss
        the file one downloads it, and the others wait.

        Args:
            folder: made if it does not exist.
            download: whether a missing file is downloaded.

        Raises:
            DataError: if the file is missing and not to be downloaded, if its download fails, or if it is not the
                published one (it is left alone then).
        """
        path = folder / self.name
        if not path.exists():
            if not download:
                raise DataError(f"{path} does not exist. {self._by_hand(folder)}")
            self._download(folder)
        self._check(path)
        return path

    def _download(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder / f"{self.name}.lock"):
                if not (folder / self.name).exists():  # else another process has downloaded it in the meantime
                    self._download_alone(folder)
        except DataError:
            raise
        except (RequestException, OSError, ValueError) as error:  # ValueError: pooch, about the digest
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
            raise DataError(f"{self.url} could not be downloaded ({reason}). {self._by_hand(folder)}") from error

    def _download_alone(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if free < self.num_bytes:
            raise DataError(
                f"{self.name} needs {self.num_bytes:,} bytes, but {folder} has {free:,} left: "
                "free some, or choose another folder with --data-root or STOCHASTIC_DEPTH_DATA."
            )
        with _DownloadProgress(self.url) as progress:
            # cast: pooch takes any function of this form, but its annotations deny it.
            downloader = cast(Any, _Resuming(folder / f"{self.name}.part", self.num_bytes, progress))
            pooch.retrieve(self.url, f"md5:{self.md5}", fname=self.name, path=folder, downloader=downloader)

    def _by_hand(self, folder: Path) -> str:
        return f"Fetch {self.url} ({self.num_bytes:,} bytes, MD5 {self.md5}) and put it into {folder}."

    def _check(self, path: Path) -> None:
        num_bytes = path.stat().st_size
        if num_bytes != self.num_bytes:
            damage = "truncated" if num_bytes < self.num_bytes else "another file"
            found = f"{path} has {num_bytes:,} bytes instead of {self.num_bytes:,}: it is {damage}."
        elif (digest := _md5_of_file(path)) != self.md5:
            found = f"{path} has MD5 {digest} instead of {self.md5}: it is damaged or altered."
        else:
            return
        raise DataError(f"{found} Remove it, and the next run downloads it again from {self.url}.")


def check_md5(content: bytes, md5: str, where: str, remedy: str) -> None:
    """Raises DataError unless the content has this digest; `where` opens the message, `remedy` closes it."""
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != md5:
        raise DataError(f"{where} has MD5 {digest} instead of {md5}: it is truncated or altered. {remedy}")


def _md5_of_file(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _alone(lock: Path) -> Generator[None]:
    """Within, no other process is; the operating system drops the lock with a process that dies."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:  # removed by who was in before; others may be at a new one
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


class _Resuming:
    """Downloads over HTTP, from where an earlier attempt was cut off.

    Args:
        part: what has come so far; it is kept only where the connection breaks.
        num_bytes: of the whole file.
        progress: is told how much there is.
    """

    def __init__(self, part: Path, num_bytes: int, progress: "_DownloadProgress") -> None:
        self.part = part
        self.num_bytes = num_bytes
        self.progress = progress

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Download to `output_file`, in the form that pooch asks for."""
        done = self.part.stat().st_size if self.part.exists() else 0
        if done >= self.num_bytes:  # it would be there under its own name, were it right
            self.part.unlink()
            done = 0
        headers = {"Range": f"bytes={done}-"} if done else {}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            response.raise_for_status()
            goes_on = response.status_code == requests.codes.partial_content
            self.progress.begin(self.num_bytes, done if goes_on else 0)
            with self.part.open("ab" if goes_on else "wb") as file:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    self.progress.update(len(chunk))
        self.part.replace(output_file)


class _DownloadProgress:
    """A bar on stderr."""

    def __init__(self, name: str) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> "_DownloadProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, total: int, done: int) -> None:
        """How many bytes there are in all, and how many have come before."""
        self._bar.update(self._task, total=total, completed=done)

    def update(self, num_bytes: int) -> None:
        """So many more have come."""
        self._bar.update(self._task, advance=num_bytes)

"""Published files of a data set: found or downloaded, and verified before they are opened."""

import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pooch
from filelock import FileLock
from pooch.downloaders import HTTPDownloader
from requests.exceptions import RequestException

from stochastic_depth_lab.errors import DataError

_TIMEOUT_S = 30
"""How long the server may be silent."""


@dataclass(frozen=True)
class PublishedFile:
    """A file on its authors' server.

    Args:
        url: its address; the last part is its name on disk too.
        num_bytes: its size.
        md5: its published MD5 digest, 32 hexadecimal digits.
    """

    url: str
    num_bytes: int
    md5: str

    @property
    def name(self) -> str:
        """Name of the file, without folders."""
        return self.url.rsplit("/", 1)[-1]

    def in_folder(self, folder: Path, *, download: bool) -> Path:
        """The path of this file in a folder, verified; a missing file is downloaded.

        Several processes that miss the file wait for one download.

        Args:
            folder: created if it does not exist.
            download: whether to download a missing file.

        Raises:
            DataError: if the file is missing, cannot be downloaded, or is not the published one (it is left alone).
        """
        path = folder / self.name
        if path.exists():
            remedy = f"Remove it, and the next run downloads it again from {self.url}."
            check_md5(path, self.md5, remedy)
            return path
        by_hand = f"Download {self.url} ({self.num_bytes:,} bytes, MD5 {self.md5}) and put it into {folder}."
        if not download:
            raise DataError(f"{path} does not exist. {by_hand}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".download.lock"):
                free = shutil.disk_usage(folder).free
                if not path.exists() and free < self.num_bytes:
                    raise DataError(
                        f"{self.name} needs {self.num_bytes:,} bytes, but {folder} has {free:,} left: "
                        "free some, or choose another folder with --data-root or STOCHASTIC_DEPTH_DATA."
                    )
                # pooch's annotations refuse its own downloaders.
                downloader = cast(Any, HTTPDownloader(progressbar=True, timeout=_TIMEOUT_S))
                pooch.retrieve(self.url, f"md5:{self.md5}", fname=self.name, path=folder, downloader=downloader)
        except DataError:
            raise
        except (RequestException, OSError, ValueError) as error:  # ValueError: the digest is wrong
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
            raise DataError(f"{self.url} could not be downloaded ({reason}). {by_hand}") from error
        return path


def check_md5(path: Path, md5: str, remedy: str) -> None:
    """Raise DataError unless a file has this digest; `remedy` ends the message."""
    digest = pooch.file_hash(path, alg="md5")
    if digest != md5:
        raise DataError(f"{path} has MD5 {digest} instead of {md5}: it is truncated or altered. {remedy}")

"""SHA-256 of files, and of bytes while they are written: beside the work, since hashing releases the interpreter.

Source: no counterpart in the original codes; Python's `hashlib`.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


CHUNK_BYTES = 8 * 1024**2
# Small enough to stay in the processor's cache, where the system reads it twice: writing takes half as long.
WRITE_BYTES = 512 * 1024
# The disk works meanwhile: otherwise the system lets gigabytes wait in memory, and all else with them at the end.
SYNC_BYTES = 256 * 1024**2


class Cancelled(Exception):
    """A file was not hashed to its end, since its hash is no longer needed."""


def hash_file(path: Path, cancel: threading.Event | None = None) -> str:
    """Hashes a file.

    Args:
        path (`Path`): The file.
        cancel (`threading.Event`, *optional*): Ends it when it is set.

    Returns:
        `str`: The hexadecimal SHA-256.

    Raises:
        Cancelled: if it was ended.
        OSError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if cancel is not None and cancel.is_set():
                raise Cancelled(str(path))
            digest.update(buffer[:count])
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> list[str]:
    """Hashes several files, two at a time.

    Args:
        paths (`Iterable[Path]`): The files.

    Returns:
        `list[str]`: Their hexadecimal SHA-256.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(hash_file, paths))


class SourceHashes:
    """Hashes files in a thread of its own, while the same files are being converted.

    Reading what comes next, it is the thread that waits for the disk: a conversion finds the bytes in memory, and the
    files are read once. It is never more than a file ahead, since memory may not hold more.

    Args:
        paths (`Iterable[Path]`): The files, in the order in which the conversion reads them.
        known (`Iterable[Path]`, *optional*): Those of them that need not be hashed.
    """

    def __init__(self, paths: Iterable[Path], known: Iterable[Path] = ()):
        self._cancel = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._states = {path: _state(path) for path in paths}
        done = set(known)
        self._paths = [path for path in self._states if path not in done]
        self._hashes: dict[Path, Future[str]] = {}

    def reached(self, path: Path) -> None:
        """Tells that the conversion reads one of the files.

        Args:
            path (`Path`): The file.
        """
        for following in self._paths[: self._paths.index(path) + 2] if path in self._paths else []:
            if following not in self._hashes:
                self._hashes[following] = self._pool.submit(hash_file, following, self._cancel)

    def __getitem__(self, path: Path) -> str:
        """The hash of one of the files, which is not known."""
        self.reached(path)
        return self._hashes[path].result()

    def check_unchanged(self) -> None:
        """Checks that all files are what they were at the beginning.

        Raises:
            ValueError: if one of them has been changed.
        """
        for path, state in self._states.items():
            if _state(path) != state:
                raise ValueError(f"{path} was changed while it was converted. Convert it again, once it is complete.")

    def close(self) -> None:
        """Stops hashing; what is not hashed yet never will be."""
        self._cancel.set()
        self._pool.shutdown(cancel_futures=True)


def _state(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


class HashedFile:
    """A new file that is written, hashed and brought onto the disk at the same time, each in one thread.

    At most one piece is being hashed when `write` returns, and is kept alive until then.

    Args:
        path (`Path`): The file, which must not exist.
    """

    def __init__(self, path: Path):
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(2)
        self._pending: Future[None] | None = None
        self._syncing: Future[None] | None = None
        self._unsynced = 0
        try:
            # Not through a link, and not into a file that someone else may have open.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except BaseException:
            self._pool.shutdown()
            raise
        self._file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes to the file.

        Args:
            data (`bytes` or `memoryview`): All of which is written. It must not change before the next call.
        """
        self._wait()
        self._pending = self._pool.submit(self._digest.update, data)
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view[:WRITE_BYTES]) :]
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()  # raises what went wrong
            self._syncing = self._pool.submit(self._sync)
            self._unsynced = 0

    def _sync(self) -> None:
        """Brings onto the disk what is written so far, and lets the system use the memory for what comes next."""
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def finish(self) -> str:
        """Brings the file onto the disk and closes it.

        Returns:
            `str`: Its hexadecimal SHA-256.
        """
        if self._syncing is not None:
            self._syncing.result()  # a disk that fails tells so once only
        os.fsync(self._file.fileno())
        self._wait()
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file as it is."""
        self._pool.shutdown()
        self._file.close()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files onto the disk, where the system can: what was renamed stays renamed.

    Args:
        folder (`Path`): The folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

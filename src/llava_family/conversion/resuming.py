"""The folder that a conversion is written to until it is complete, and where a rerun finds what is finished.

Design choices:
- It is hidden and lies beside the output, `.<name>.incomplete`: the output appears at once, by a rename.
- One conversion at a time: the folder is locked itself, and the system gives that up when a process ends, however that
  happens.
- What cannot be told to be an earlier conversion's is never deleted.
- Its weights come first and config.json last, so that a part of it does not load.

Source: no counterpart in the original codes or in transformers, whose conversions begin anew.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .hashing import hash_files
from .manifest import MANIFEST_FILE, Manifest, SourceFile
from .writing import PARTIAL_SUFFIX, check_output_folder, move_to_output


try:
    import fcntl
except ImportError:  # Windows: two runs at once are not noticed there
    fcntl = None  # type: ignore[assignment]

REFUSAL = (
    "A conversion would be written to {} until it is complete, but this is not what an earlier one left: {}. Move it "
    "away, or choose another output."
)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def resumable_folder(
    output: str | os.PathLike,
    manifest: Manifest,
    paths: dict[Path, SourceFile],
    report: Callable[[str], None] = print,
) -> Iterator[Path]:
    """A folder to write to that is renamed to `output` at the end, and that a rerun of the conversion goes on with.

    Whatever resuming can mend leaves it where it is: an interruption, a full disk. A ValueError removes it.

    Args:
        output (`str` or `os.PathLike`): New or empty folder. Its parents are created and stay.
        manifest (`Manifest`): What is to be written. Receives what was finished earlier.
        paths (`dict[Path, SourceFile]`): Where the sources lie.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what is done with earlier work.

    Yields:
        `Path`: The folder to write to.

    Raises:
        ValueError: if `output` is not empty, another conversion writes to it, or something else has its place.
        OSError: if it cannot be written to.
    """
    path = check_output_folder(output)
    incomplete = path.parent / f".{path.name}.incomplete"
    with _clear_errors(path), _locked(path, incomplete):
        check_output_folder(path)
        _prepare(incomplete, manifest, paths, report)
        try:
            yield incomplete
            move_to_output(incomplete, path)
        except ValueError:
            with suppress(OSError):
                _discard(incomplete)
            raise
        except BaseException:
            done = f"{len(manifest.finished)} of {len(manifest.shards)} files of weights are finished"
            report(f"Interrupted: {done}, in {incomplete}. Run the same conversion again to go on.")
            raise


def _prepare(
    incomplete: Path, manifest: Manifest, paths: dict[Path, SourceFile], report: Callable[[str], None]
) -> None:
    """Takes over what an earlier run has finished, or begins anew."""
    earlier = _earlier(incomplete)
    if earlier is not None and manifest.continues(earlier) and _same_sources(manifest, earlier, paths):
        _take_over(incomplete, manifest, earlier, report)
    else:
        if earlier is not None:
            report("Discarded what an earlier conversion, of other files or with other options, had left.")
        # Not the folder itself, which is locked. The manifest last: interrupted, the rest is still known to be ours.
        _empty(incomplete, but={MANIFEST_FILE})
        _empty(incomplete, but=set())
    manifest.save(incomplete)


def _earlier(incomplete: Path) -> Manifest | None:
    """The manifest of an earlier run, None if it ended before it wrote one; ValueError if it is not one's folder."""
    if incomplete.is_symlink() or not incomplete.is_dir():
        raise ValueError(REFUSAL.format(incomplete, "it is no folder"))
    found = {path.name: path for path in incomplete.iterdir()}
    links = [name for name, path in found.items() if path.is_symlink()]
    if links:
        raise ValueError(REFUSAL.format(incomplete, f"{links[0]} is a link"))
    if MANIFEST_FILE not in found:
        others = set(found) - {MANIFEST_FILE + PARTIAL_SUFFIX}
        if others:
            raise ValueError(
                REFUSAL.format(incomplete, f"it has {', '.join(sorted(others)[:3])} and no {MANIFEST_FILE}")
            )
        return None
    try:
        return Manifest.load(found[MANIFEST_FILE])
    except ValueError as error:
        raise ValueError(REFUSAL.format(incomplete, error)) from error


def _same_sources(manifest: Manifest, earlier: Manifest, paths: dict[Path, SourceFile]) -> bool:
    """Whether the sources that the earlier run knew are still what they were; only where it has finished anything."""
    known = {(source.role, source.name): source.sha256 for source in earlier.sources if source.sha256 is not None}
    if not earlier.finished:
        return True
    checked = {path: source for path, source in paths.items() if (source.role, source.name) in known}
    for source, digest in zip(checked.values(), hash_files(checked), strict=True):
        if digest != known[source.role, source.name]:
            return False
        source.sha256 = digest
    return True


def _take_over(incomplete: Path, manifest: Manifest, earlier: Manifest, report: Callable[[str], None]) -> None:
    """Keeps the finished files of weights that are still what they were, and nothing else."""
    names = [name for name in earlier.finished if (incomplete / name).is_file()]
    digests = dict(zip(names, hash_files(incomplete / name for name in names), strict=True))
    for name in names:
        if digests[name] == earlier.finished[name]:
            manifest.shards[name] = earlier.shards[name]
    _empty(incomplete, but={*manifest.finished, MANIFEST_FILE})
    if manifest.finished:
        report(f"Resumed: {len(manifest.finished)} of {len(manifest.shards)} files of weights were finished.")


def _discard(incomplete: Path) -> None:
    """Removes it, the manifest last: interrupted, what is left is still known to be ours."""
    _empty(incomplete, but={MANIFEST_FILE})
    shutil.rmtree(incomplete)


def _empty(incomplete: Path, but: set[str]) -> None:
    for path in incomplete.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _locked(output: Path, incomplete: Path) -> Iterator[None]:
    """Makes the folder and locks it itself: the lock goes with it, and no file of its own could be left behind."""
    incomplete.parent.mkdir(parents=True, exist_ok=True)
    descriptor = None if fcntl is None else _acquire(output, incomplete)
    try:
        incomplete.mkdir(exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            incomplete.rmdir()  # if nothing is in it
        if descriptor is not None:
            os.close(descriptor)


def _acquire(output: Path, incomplete: Path) -> int:
    while True:
        with suppress(FileExistsError):
            incomplete.mkdir()
        if incomplete.is_symlink() or not incomplete.is_dir():
            raise ValueError(REFUSAL.format(incomplete, "it is no folder"))
        descriptor = os.open(incomplete, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if incomplete.exists() and os.path.samestat(os.stat(incomplete), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"Another conversion is writing to {output}. Wait until it ends, or choose another output."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # that of a run that ended just now


@contextmanager
def _clear_errors(output: Path) -> Iterator[None]:
    """Says what an error of the system means here."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise OSError(
                error.errno,
                f"The disk of {output.parent} is full ({error.strerror}). Free some, and run the same conversion "
                "again: it goes on with what is finished",
            ) from error
        ours = str(error.filename or "").startswith(str(output.parent))
        if ours and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OSError(
                error.errno,
                f"{output.parent} cannot be written to ({error.strerror}: {error.filename}). Choose an output in "
                "another folder",
            ) from error
        raise

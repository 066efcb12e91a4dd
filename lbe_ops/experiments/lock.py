# SPDX-License-Identifier: Apache-2.0
"""One writer at a time, by a lock that ends with its process, however that ends.

The lock is the system's (`flock`) on a file, not the file itself: what a killed process
leaves behind keeps nobody out. It holds between the machines that share a folder by NFS
as well. Where there are no such locks (Windows, some network file systems) a note says
so, and nobody is kept out: files are replaced whole even then, the last one wins.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
from collections.abc import Iterator

from lbe_ops.experiments.errors import ExperimentError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# By these `flock` says that the file system has no locks, or none that work.
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def exclusive(path: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """Keeps all other processes out of such a block while this one is in it.

    Args:
        path: the file to lock; its folder is made if need be. Both are gone after the
            block, the folder where it was made here and holds nothing else.
        target: what is written in the block, for people.

    Returns:
        A context manager.

    Raises:
        ExperimentError: another process holds the lock, or the file cannot be written.
    """
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, target)
    except OSError as error:
        raise ExperimentError(
            f"{target} cannot be written: {error.strerror}"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Removed while it is locked, and nobody else's.
            if _is_named(descriptor, path):
                path.unlink()
            if made:
                path.parent.rmdir()
        os.close(descriptor)


def _acquire(path: pathlib.Path, target: pathlib.Path) -> int:
    """The descriptor of the file that is locked, or cannot be."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            reason = _lock(descriptor)
            if reason:
                print(f"note: no lock keeps others from writing {target} ({reason})")
                return descriptor
            # Whoever held the lock may have removed the file after it was opened here.
            if _is_named(descriptor, path):
                with contextlib.suppress(OSError):  # a full disk; this is for people
                    os.ftruncate(descriptor, 0)
                    name = f"process {os.getpid()} on {socket.gethostname()}"
                    os.write(descriptor, name.encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace")
            os.close(descriptor)
            raise ExperimentError(
                f"{target} is being written by {holder or 'another process'}; wait for "
                "its end, or choose another --output"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> str:
    """Locks a file; returns why it cannot be locked at all, or ''.

    Raises:
        BlockingIOError: somebody else has locked it.
    """
    if fcntl is None:
        return "this system has none"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return f"the file system has none: {error.strerror}"
    return ""


def _is_named(descriptor: int, path: pathlib.Path) -> bool:
    """Whether a path is still that of the file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

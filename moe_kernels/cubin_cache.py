# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk, in a folder that is the user's alone: a GPU runs what lies there.

The folder is $MOE_KERNELS_CACHE, else $XDG_CACHE_HOME/moe_kernels, else ~/.cache/moe_kernels. It is made with mode
0700; one that is a link, that belongs to someone else or that others may enter is not used. A file is written beside
its place and renamed, so that a reader sees all of it or nothing, and its digest is checked when it is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"moe_kernels cubin 1\n"
_HEAD = struct.Struct(f"<{len(_MAGIC)}s32s")  # magic, digest of what follows: length of the name, name, cubin
_LENGTH = struct.Struct("<Q")


def folder() -> Path:
    """Where compiled kernels are kept; it need not be there."""
    if named := os.environ.get("MOE_KERNELS_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moe_kernels"


def _fault(status: os.stat_result, path: Path) -> str:
    """Why a folder is not private, or an empty string."""
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, not to this process's user {os.geteuid()}"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 700 it"
    return ""


@contextlib.contextmanager
def _opened(create: bool) -> Iterator[int]:
    """A handle of the folder, so that nobody can exchange it in between. Errors: OSError, also where it is refused."""
    path = folder()
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link")
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if fault := _fault(os.fstat(handle), path):
            raise OSError(fault)
        yield handle
    finally:
        os.close(handle)


def problem() -> str:
    """Why nothing is kept there, or an empty string."""
    try:
        with _opened(create=True):
            return ""
    except (OSError, RuntimeError) as error:  # Path.home() knows none
        return str(error)


@functools.cache
def _warn_once(why: str) -> None:
    warnings.warn(f"moe_kernels: compiled kernels are not kept for the next process: {why}", RuntimeWarning, 5)


def read(key: str) -> tuple[bytes, bytes] | None:
    """(cubin, kernel's name) under `key`; None if there is none, or none that can be trusted."""
    try:
        with _opened(create=False) as handle:
            file = os.open(f"{key}.cubin", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
            with os.fdopen(file, "rb") as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    return None
                content = stream.read()
    except (OSError, RuntimeError):
        return None
    if len(content) < _HEAD.size + _LENGTH.size:
        return None
    magic, digest = _HEAD.unpack_from(content)
    body = content[_HEAD.size :]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    begin, end = _LENGTH.size, _LENGTH.size + _LENGTH.unpack_from(body)[0]
    return body[end:], body[begin:end]


def write(key: str, cubin: bytes, name: bytes) -> None:
    """Keeps a kernel; where that is not possible, one warning says why and the program goes on."""
    body = _LENGTH.pack(len(name)) + name + cubin
    content = _HEAD.pack(_MAGIC, hashlib.sha256(body).digest()) + body
    aside = f".{key[:16]}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with _opened(create=True) as handle:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(aside, flags, 0o600, dir_fd=handle)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(content)
                os.rename(aside, f"{key}.cubin", src_dir_fd=handle, dst_dir_fd=handle)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=handle)
                raise
    except (OSError, RuntimeError) as error:
        _warn_once(str(error))

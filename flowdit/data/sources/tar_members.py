"""The samples of a WebDataset tar, read one after the other: files of the same name up to the first dot of it.

Nothing is extracted: a name is only a name. Headers are bounded, as a tar may come from anywhere.
"""

import gzip
import io
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flowdit.data.images import SUFFIXES
from flowdit.data.sources.base import MAX_FILE_BYTES
from flowdit.data.sources.columns import MAX_TEXT_BYTES
from flowdit.errors import first_line

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_HEADER_BYTES = 2**20
"""Of a long name or of other attributes of a member."""
MAX_OFFSET = 2**62
MAX_FILES = 1000
"""Files of a sample."""


@dataclass
class Sample:
    """Files of one name: sizes of all by suffix, contents of those that were read.

    An image over `MAX_FILE_BYTES` and a text over `MAX_TEXT_BYTES` are not read.
    """

    number: int
    name: str
    sizes: dict[str, int] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        """The suffixes of its images: "jpg" before "mask.jpg"."""
        found = [suffix for suffix in self.sizes if is_image(suffix)]
        plain = [suffix for suffix in found if "." not in suffix]
        return plain or found


def is_image(suffix: str) -> bool:
    return f".{suffix}".endswith(SUFFIXES)


def samples(
    stream: io.BufferedReader, path: str, wants: Callable[[int], bool], reads: Callable[[str], bool]
) -> Iterator[Sample]:
    """The samples of the tar `path` with a number that `wants` holds for, with the files whose suffix `reads` holds for.

    Raises `ValueError` with the place where the tar is damaged or ends early.
    """
    mode = "r:" if path.lower().partition("?")[0].endswith(".tar") else "r:gz"
    place = 0
    sample = Sample(-1, "")
    try:
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                if not place < tar.offset < MAX_OFFSET or member.size < 0:
                    raise tarfile.ReadError(f"{_shown(member.name)} has a size that no file has")
                name, suffix = _parts(member)
                if suffix and name != sample.name:
                    if sample.sizes and wants(sample.number):
                        yield sample
                    sample = Sample(sample.number + 1, name)
                if suffix:
                    _add(sample, suffix, tar, member, wants(sample.number) and reads(suffix))
                tar.members.clear()  # type: ignore[attr-defined]
                tar.pax_headers = {}
                place = tar.offset
            _check_end(tar)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as problem:
        where = f"is damaged or cut off at byte {place}" if place else "is no tar that can be read"
        raise ValueError(f"{path}: {where}: {first_line(problem)}") from None
    if sample.sizes and wants(sample.number):
        yield sample


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """Name of the sample and suffix of a file; "" for what belongs to none: folders, links, hidden files."""
    folder, base = posixpath.split(member.name)
    stem, _, suffix = base.partition(".")
    return (posixpath.join(folder, stem), suffix.lower()) if stem and member.isreg() else ("", "")


def _add(sample: Sample, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, is_read: bool) -> None:
    if suffix in sample.sizes:
        raise tarfile.ReadError(f"two files are named {_shown(member.name)}")
    if len(sample.sizes) == MAX_FILES:
        raise tarfile.ReadError(f"more than {MAX_FILES} files of one sample: {_shown(member.name)}")
    sample.sizes[suffix] = member.size
    if is_read and member.size <= (MAX_FILE_BYTES if is_image(suffix) else MAX_TEXT_BYTES):
        content = tar.extractfile(member)
        sample.contents[suffix] = b"" if content is None else content.read()


class _Header(tarfile.TarInfo):
    """A header whose attributes fit into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        has_data = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        if self.type in (*has_data, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        try:
            return super()._proc_member(tar)  # type: ignore[misc]
        except ValueError as problem:
            raise tarfile.ReadError(first_line(problem)) from None

    def _refuse_sparse(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file, whose list of parts has no bound")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse  # the three formats of such headers


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the tar ends with blocks of zeros: `tarfile` takes any other header for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("the blocks that end a tar are missing")
    if any(block):
        raise tarfile.ReadError("bad header")


def _shown(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()[:1000]


def safe_name(name: str) -> str:
    """A name that is no path to elsewhere, in letters that can be written."""
    return "/".join(part for part in _shown(name).split("/") if part not in ("", ".", ".."))

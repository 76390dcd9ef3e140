"""Human recordings: four Debian packages of freely licensed speech, fetched with apt-get and read here.

`fetch` downloads the packages; it does not install them and needs no root. `read` yields their recordings,
from the packages or from a folder into which they were unpacked. Nothing is unpacked to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import lzma
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from clsp_fast.storage import files

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
# Letters in the file names of the game: malá ryba, the small fish, and velká, the big one.
_FISH = {"m": "female", "v": "male"}
# Speakers of the stamps by language. The package does not name their sex: it was decided once for each voice,
# from Praat's F0 of 62 to 80 recordings (quartiles: bg 110 to 116 Hz, ca 129 to 151, el 194 to 224, es 241 to
# 263).
_STAMPS = {"bg": "male", "ca": "male", "el": "female", "es": "female"}


_ZSTD = (
    "compressed with zstd, and no dpkg-deb is installed here to unpack it. Unpack the packages elsewhere "
    "with `dpkg-deb -x FILE FOLDER`, and name the folder with --data.recordings"
)


class FetchError(RuntimeError):
    """The recordings cannot be fetched or read. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A Debian package with recordings of speech."""

    name: str
    about: str
    licence: str
    megabytes: int
    recordings: int
    """About how many clips come of it."""
    paths: re.Pattern[str]
    """Matches the paths of its recordings."""


class Voice(NamedTuple):
    """Who speaks in a recording, as far as the path says."""

    name: str
    sex: str
    """ "female", "male" or "": not known."""


class Recording(NamedTuple):
    """One file of a package."""

    package: str
    path: str
    """Path within the package, without a leading "/"."""
    content: bytes


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="fillets-ng-data-cs",
            about="actors of a game, Czech",
            licence="GPL-2",
            megabytes=39,
            recordings=940,
            paths=re.compile(r"/sound/.*/cs/[^/]*\.ogg$"),
        ),
        Package(
            name="fillets-ng-data-nl",
            about="actors of a game, Dutch",
            licence="GPL-2",
            megabytes=33,
            recordings=810,
            paths=re.compile(r"/sound/.*/nl/[^/]*\.ogg$"),
        ),
        Package(
            name="festvox-ru",
            about="read sentences, Russian",
            licence="BSD-like (N. V. Shmyrev, 2005)",
            megabytes=179,
            recordings=150,
            paths=re.compile(r"/wav/[^/]*\.wav$"),
        ),
        Package(
            name="tuxpaint-stamps-default",
            about="names of pictures, spoken in 15 languages",
            licence="GPL-2",
            megabytes=161,
            recordings=1000,
            paths=re.compile(r"/stamps/.*_desc[^/]*\.(ogg|wav)$"),
        ),
    )
}


def voice_of(package: str, path: str) -> Voice:
    """The voice of a recording, or a group of voices where several speakers share a name.

    All recordings of a speaker have the same name. A language of the stamps, or the other actors of the game,
    may be several speakers.
    """
    name = path.rpartition("/")[2]
    if package.startswith("fillets"):
        part = re.search(r"(?:^|-)([mv])-", name)
        if part is None:
            return Voice(f"{package}/others", "")
        return Voice(f"{package}/{part[1]}", _FISH[part[1]])
    if package == "festvox-ru":
        return Voice(package, "male")
    language = re.search(r"_desc_?([A-Za-z_]*)\.", name)
    code = language[1] if language and language[1] else "en"
    return Voice(f"tuxpaint/{code}", _STAMPS.get(code, ""))


def fetch(folder: Path, *, say: Callable[[str], None] = print) -> list[Path]:
    """Downloads the packages that `folder` lacks with `apt-get download`, which checks their hashes.

    A package that is complete in the folder is kept. An interrupted download leaves no package behind.
    Several runs can use the folder at the same time: a package appears there when it is complete, and stays.

    Args:
        folder: where the packages are kept; it is created.
        say: receives a line for each download.

    Returns:
        The four packages, in the order of `PACKAGES`.

    Raises:
        FetchError: there is no apt-get, or it failed; the message says how to go on without it.
        files.DiskFull: there is no room for the packages.
    """
    with files.naming_full_disk(folder, sum(package.megabytes for package in PACKAGES.values()) * 10**6):
        folder.mkdir(parents=True, exist_ok=True)
        present = {name: _complete_package(folder, name) for name in PACKAGES}
        paths = [present[name] or _fetch_package(PACKAGES[name], folder, say) for name in PACKAGES]
    if None in present.values():
        say(f"the packages are in {folder}; other runs use them with `--data.recordings {folder}`")
    return paths


def _complete_package(folder: Path, name: str) -> Path | None:
    """The package in the folder, if it is there and not damaged."""
    for path in _packages_in(folder, name):
        with contextlib.suppress(FetchError, FileNotFoundError), path.open("rb") as file:
            _seek_data(file, path)
            return path
    return None


def _fetch_package(package: Package, folder: Path, say: Callable[[str], None]) -> Path:
    say(f"fetching {package.name} ({package.about}; {package.licence}): {package.megabytes} MB")
    command = shutil.which("apt-get")
    if command is None:
        raise FetchError(f"no apt-get is installed here. {_without_apt(folder)}")
    if _has_zstd_packages() and shutil.which("dpkg-deb") is None:
        raise FetchError(f"the packages of this system may be {_ZSTD}")
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as work:
        done = subprocess.run(
            [command, "download", package.name],
            cwd=work,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        downloaded = next(iter(_packages_in(Path(work), package.name)), None)
        if done.returncode or downloaded is None:
            raise FetchError(_explain(package.name, done.stderr, folder))
        with downloaded.open("rb") as file:
            _seek_data(file, downloaded)
        path = downloaded.replace(folder / downloaded.name)
    # Damaged ones are deleted only now: another run, which uses the same folder, may have replaced them.
    for other in _packages_in(folder, package.name):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _has_zstd_packages() -> bool:
    """Whether this is Ubuntu, or made from it: Debian compresses its packages with xz."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return "ubuntu" in f"{system.get('ID', '')} {system.get('ID_LIKE', '')}"


def _explain(name: str, output: str, folder: Path) -> str:
    """A message for a download that failed, with the first error of apt-get."""
    errors = [line[2:].strip() for line in output.splitlines() if line.startswith("E:")]
    reason = errors[0] if errors else (output.strip().splitlines() or ["no output"])[-1]
    unknown = "Unable to locate" in output or "Can't find a source" in output
    hint = (
        "Run `apt-get update` as root once, and try again; or else: " if unknown else "Try again; or else: "
    )
    return f"apt-get could not download {name}: {reason}. {hint}{_without_apt(folder)}"


def _without_apt(folder: Path) -> str:
    urls = ", ".join(f"https://packages.debian.org/stable/{name}" for name in PACKAGES)
    return (
        f"Download the four .deb files with any browser ({urls}) and put them into {folder}, or into another "
        "folder that you name with --data.recordings FOLDER; the folder may also hold the unpacked packages."
    )


def _packages_in(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}_*.deb"))


def read(folder: Path, name: str) -> Iterator[Recording]:
    """The recordings of a package, from a folder with its .deb file, or with what `dpkg-deb -x` made of it.

    The order is that of the archive, or of the paths.

    Raises:
        FetchError: the folder holds no recording of the package, or the package is damaged.
    """
    package = PACKAGES[name]
    deb = _complete_package(folder, name) or next(iter(_packages_in(folder, name)), None)
    empty = True
    for recording in _unpacked(folder, package) if deb is None else _packed(deb, package):
        empty = False
        yield recording
    if empty:
        raise FetchError(f"{folder} holds no recording of {name}, neither in a .deb file nor unpacked")


def _unpacked(folder: Path, package: Package) -> Iterator[Recording]:
    """Recordings of an unpacked package: below a folder with its name, or anywhere if there is none."""
    top = folder / package.name if (folder / package.name).is_dir() else folder
    for path in sorted(top.rglob("*")):
        name = path.relative_to(top).as_posix()
        if package.paths.search(f"/{name}") and path.is_file():
            yield Recording(package.name, name, path.read_bytes())


def _packed(deb: Path, package: Package) -> Iterator[Recording]:
    try:
        with _archive(deb) as archive:
            for member in archive:
                if member.isfile() and package.paths.search(f"/{member.name}"):
                    file = archive.extractfile(member)
                    if file is not None:
                        yield Recording(package.name, member.name.removeprefix("./"), file.read())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise FetchError(f"{deb} is damaged ({error}); delete it, and it is fetched again") from error


@contextlib.contextmanager
def _archive(deb: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package as a stream.

    tarfile knows the compressions of Debian's packages, but not the zstd of Ubuntu's, which dpkg-deb knows.
    """
    with deb.open("rb") as file:
        if not _seek_data(file, deb).endswith(".zst"):
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                yield archive
            return
    if shutil.which("dpkg-deb") is None:
        raise FetchError(f"{deb} is {_ZSTD}")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                yield archive
            # tarfile takes an archive that ends between two files for complete.
            while unpacking.stdout is not None and unpacking.stdout.read(1 << 16):
                pass
            if unpacking.wait():
                raise FetchError(f"{deb} is damaged (dpkg-deb); delete it, and it is fetched again")
        finally:
            unpacking.kill()


def _seek_data(file: IO[bytes], deb: Path) -> str:
    """Moves to the archive of the package's files, and returns its name. A .deb is an ar archive whose last
    member this is.

    Raises:
        FetchError: the file is not a package, or its end is missing.
    """
    size = os.fstat(file.fileno()).st_size
    position = len(_AR_MAGIC)
    if file.read(position) != _AR_MAGIC:
        raise FetchError(f"{deb} is not a Debian package; delete it, and it is fetched again")
    while position < size:
        file.seek(position)
        header = file.read(_AR_HEADER_BYTES)
        name, length = (
            header[:16].decode("latin-1").strip().rstrip("/"),
            header[48:58].decode("latin-1").strip(),
        )
        if not length.isdigit() or position + _AR_HEADER_BYTES + int(length) > size:
            break
        if name.startswith("data.tar"):
            return name
        position += _AR_HEADER_BYTES + int(length) + int(length) % 2
    raise FetchError(f"{deb} is incomplete; delete it, and it is fetched again")

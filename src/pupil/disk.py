"""What the operating system refuses, as one line that says what to do.  No torch."""

import errno
import tempfile
from pathlib import Path

ROOM = "make room (`python -m pupil doctor` shows the disks), then give the same command again"
RIGHTS = "give another folder, or the right to write there (`python -m pupil doctor` says how)"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), RIGHTS),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG), "give another path"),
    errno.EIO: "the disk may be failing: copy out/ to another one, then look at the system's log (dmesg)",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
}


def refuse_unwritable(path: Path) -> None:
    """OSError where a folder cannot be made or written to, before the work whose result it is to hold; leaves nothing."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"x")


def told(e: OSError) -> str | None:
    """None: not for the user to mend."""
    advice = ADVICE.get(e.errno or 0)
    where = f"{e.filename2 or e.filename}: " if e.filename else ""
    return None if advice is None else f"{where}{e.strerror}; {advice}"

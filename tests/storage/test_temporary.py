"""Temporary files: gone after any failure, and told from those of the living."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from endor.errors import EndorWarning
from endor.storage import TemporaryFile, remove_stale_temporaries

MAKE = """
import sys
from pathlib import Path
from endor.storage import TemporaryFile
file = TemporaryFile(Path(sys.argv[1]))
print(file.path, flush=True)
sys.stdin.read()
"""


def start(target: Path) -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def test_commit_gives_the_name_and_discard_takes_everything(tmp_path: Path) -> None:
    target = tmp_path / "x"
    file = TemporaryFile(target)
    os.write(file.fd, b"new")
    assert not target.exists()
    file.commit()
    file.discard()
    assert target.read_bytes() == b"new"
    file = TemporaryFile(target)
    file.discard()
    file.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        TemporaryFile(tmp_path / "x").commit()
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_complete_file_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails after the rename is a warning: the file is there, and whole."""
    from endor.storage import temporary

    def fail(directory: Path) -> None:
        raise OSError(5, "Input/output error", str(directory))

    monkeypatch.setattr(temporary, "sync_directory", fail)
    with pytest.warns(EndorWarning, match="is complete, but"):
        TemporaryFile(tmp_path / "x").commit()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_two_for_one_target(tmp_path: Path) -> None:
    one, two = TemporaryFile(tmp_path / "x"), TemporaryFile(tmp_path / "x")
    assert one.path != two.path
    one.discard()
    two.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_directory_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        TemporaryFile(tmp_path)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TemporaryFile(tmp_path / "no" / "x")


def test_a_target_with_the_longest_name(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    TemporaryFile(target).commit()
    assert target.exists()


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    mine = TemporaryFile(tmp_path / "mine")
    living, living_path = start(tmp_path / "living")
    dead, dead_path = start(tmp_path / "dead")
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait(30)
        others = [tmp_path / name for name in (".x.tmp", "x.1.2.tmp", ".x.1.tmp", ".x.y.1.tmp")]
        for path in others:
            path.touch()
        link = tmp_path / ".link.1.2.tmp"
        link.symlink_to(others[0])
        pipe = tmp_path / ".pipe.1.2.tmp"
        os.mkfifo(pipe)
        second = tmp_path / ".second.1.2.tmp"
        second.hardlink_to(others[0])
        assert remove_stale_temporaries(tmp_path, "other") == []
        assert remove_stale_temporaries(tmp_path, "dead") == [dead_path]
        dead_path.touch()
        assert remove_stale_temporaries(tmp_path) == [dead_path]
        assert pipe.exists()
        assert second.exists()
        assert living_path.exists()
        assert mine.path.exists()
        assert link.is_symlink()
        assert all(path.exists() for path in others)
    finally:
        for child in (living, dead):
            child.communicate()
        mine.discard()
    (tmp_path / ".second.1.2.tmp").unlink()
    assert remove_stale_temporaries(tmp_path) == [living_path]
    assert remove_stale_temporaries(tmp_path) == []


def test_a_file_that_a_cleaner_took_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock = fcntl.flock
    taken: list[Path] = []

    def faster(fd: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", faster)
    file = TemporaryFile(tmp_path / "x")
    assert taken
    assert file.path.exists()
    file.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]

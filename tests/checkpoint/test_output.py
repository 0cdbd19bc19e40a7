import json

import pytest

from endor.checkpoint.output import JOURNAL_NAME, OutputDirectory
from endor.errors import CheckpointError, OutputExistsError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


def leave(out, source, lines, identity=None):
    """Leave an unfinished run with some files."""
    with OutputDirectory(out, identity=identity or {"a": 1}, source=source) as output:
        for number in range(lines):
            (output.partial / f"file{number}").write_text("x")
            output.finish_file({"file": f"file{number}"})


def test_publishing(tmp_path, source):
    out = tmp_path / "deep" / "out"
    with OutputDirectory(out, identity={}, source=source) as output:
        (output.partial / "a").write_text("content")
        assert not out.exists()
        output.publish()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nothing_stays_when_no_file_was_finished(tmp_path, source):
    leave(tmp_path / "out", source, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_last_line_that_was_cut_short(tmp_path, source):
    out = tmp_path / "out"
    leave(out, source, 2)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    with journal.open("a") as file:
        file.write('{"file": "file2')
    with OutputDirectory(out, identity={"a": 1}, source=source, resume=True) as output:
        assert [entry["file"] for entry in output.finished] == ["file0", "file1"]
        output.finish_file({"file": "file2"})
        lines = journal.read_text().splitlines()
        assert [json.loads(line).get("file") for line in lines[1:]] == ["file0", "file1", "file2"]


def test_other_identity(tmp_path, source):
    leave(tmp_path / "out", source, 1, identity={"codec": "raw", "same": 1})
    changed = {"codec": "auto", "same": 1}
    with (
        pytest.raises(CheckpointError, match=r'codec was "raw" and is now "auto"'),
        OutputDirectory(tmp_path / "out", identity=changed, source=source, resume=True),
    ):
        pass
    with OutputDirectory(tmp_path / "out", identity=changed, source=source, overwrite=True) as new:
        assert new.finished == []
        assert [path.name for path in new.partial.iterdir()] == [JOURNAL_NAME]


def test_two_at_once(tmp_path, source):
    out = tmp_path / "out"
    with OutputDirectory(out, identity={}, source=source):
        with (
            pytest.raises(CheckpointError, match="another process is writing"),
            OutputDirectory(out, identity={}, source=source, overwrite=True),
        ):
            pass
        assert (tmp_path / "out.partial").exists()


def test_mount_points_are_refused(source):
    with (
        pytest.raises((CheckpointError, OutputExistsError), match="mount point"),
        OutputDirectory("/proc", identity={}, source=source),
    ):
        pass


def test_no_permission(source):
    """Nobody, not even root, may make directories there."""
    with (
        pytest.raises(OSError, match="endor-out") as caught,
        OutputDirectory("/proc/self/endor-out", identity={}, source=source),
    ):
        pass
    assert "endor-out" in str(caught.value.filename)


def test_a_failed_rename_restores_what_was_there(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    renames = []

    def rename(path, target):
        renames.append(path.name)
        if path.name == "out.partial":
            raise OSError(28, "No space left on device", str(path))
        return original(path, target)

    original = type(out).rename
    with OutputDirectory(out, identity={}, source=source, overwrite=True) as output:
        monkeypatch.setattr(type(out), "rename", rename)
        with pytest.raises(OSError, match="No space left"):
            output.publish()
    assert renames[0] == "out"
    assert (out / "config.json").read_text() == "old"

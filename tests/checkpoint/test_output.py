"""An output appears whole or not at all, and nothing that is not Endor's is ever touched."""

import contextlib
import json
import os
import warnings
from pathlib import Path

import pytest

from endor.checkpoint import output as module
from endor.checkpoint.output import OutputDirectory, check_output
from endor.checkpoint.partial import CONTENT_NAME, JOURNAL_NAME, REPLACED_NAME
from endor.errors import CheckpointError, EndorError, EndorWarning, OutputExistsError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    (path / "weights").write_text("precious")
    return path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """No power is cut here: what a process sees is the same without."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def shard(number):
    return f"endor-{number + 1:05d}.safetensors"


def leave(out, source, lines, identity=None):
    """Leave an unfinished run with some files."""
    with OutputDirectory(out, identity=identity or {"a": 1}, source=source) as output:
        for number in range(lines):
            (output.folder / shard(number)).write_text("x")
            output.finish_file({"file": shard(number)})


def write(out, source, text="new", **options):
    """Publish one file, `model.safetensors`."""
    writes = {"model.safetensors": None}
    with OutputDirectory(out, identity={"a": 1}, source=source, writes=writes, **options) as output:
        (output.folder / "model.safetensors").write_text(text)
        output.finish_file({"file": "model.safetensors"})
        output.publish(["model.safetensors"])


def tree(path):
    """Return everything below `path`: the content of files, the targets of links."""
    found = {}
    for item in sorted(path.rglob("*")):
        name = str(item.relative_to(path))
        if item.is_symlink():
            found[name] = f"-> {item.readlink()}"
        else:
            found[name] = item.read_text() if item.is_file() else "/"
    return found


def enter(out, source, **options):
    with OutputDirectory(out, identity={"a": 1}, source=source, **options):
        pass


def refused(out, source, match, kind=EndorError, **options):
    """Fail unless nothing begins and nothing changes, with any option."""
    before = tree(source.parent)
    variants = [options] if options else [{}, {"overwrite": True}, {"resume": True}]
    for variant in variants:
        for start in (enter, check_output):
            with pytest.raises(kind, match=match):
                start(out, source, **({"writes": {}} | variant))
            assert tree(source.parent) == before


def test_publishing(tmp_path, source):
    out = tmp_path / "deep" / "out"
    with OutputDirectory(out, identity={}, source=source, writes={"a": None}) as output:
        (output.folder / "a").write_text("content")
        assert not out.exists()
        assert output.partial.stat().st_mode & 0o777 == 0o700
        output.publish(["a"])
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize(("written", "names"), [("ab", "a"), ("a", "ab")])
def test_only_what_was_announced_is_published(tmp_path, source, written, names):
    with OutputDirectory(tmp_path / "out", identity={}, source=source) as output:
        for name in written:
            (output.folder / name).write_text("content")
        with pytest.raises(CheckpointError, match="b was added or removed"):
            output.publish(names)
    assert not (tmp_path / "out").exists()


def test_nothing_stays_when_no_file_was_finished(tmp_path, source):
    leave(tmp_path / "out", source, 0)
    leave(tmp_path / "deep" / "er" / "out", source, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_last_line_that_was_cut_short(tmp_path, source):
    out = tmp_path / "out"
    leave(out, source, 2)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    with journal.open("a") as file:
        file.write('{"file": "file2')
    with OutputDirectory(out, identity={"a": 1}, source=source, resume=True) as output:
        assert [entry["file"] for entry in output.finished] == [shard(0), shard(1)]
        output.finish_file({"file": shard(2)})
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        files = [line["file"] for line in lines if "file" in line]
        assert files == [shard(0), shard(1), shard(2)]


def test_a_journal_that_was_cut_short_at_its_start(tmp_path, source):
    out = tmp_path / "out"
    leave(out, source, 1)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    whole = journal.read_bytes()
    (tmp_path / "out.partial" / CONTENT_NAME / shard(0)).unlink()
    for length in range(len(whole.splitlines()[0]) + 1):
        journal.write_bytes(whole[:length])
        with OutputDirectory(out, identity={"a": 1}, source=source) as output:
            assert output.finished == []
        assert not output.partial.exists()
        output.partial.mkdir()


HOSTILE_LINES = [
    '{"file":{}}',
    '{"file":["a"]}',
    '{"file":5}',
    '{"writes":[{},[],5]}',
    '{"writes":5}',
]
HOSTILE_LINES += [
    '{"writes":5}',
    '{"publishing":[{}]}',
    '{"publishing":5}',
    '{"file":"..","x":' + "9" * 5000 + "}",
]
HOSTILE_LINES += ["[" * 100_000, '{"file":"\\ud800"}', "null", "\0", '{"writes":["../x"]}']


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=range(len(HOSTILE_LINES)))
def test_hostile_lines(tmp_path, source, line):
    out = tmp_path / "out"
    leave(out, source, 1)
    with (tmp_path / "out.partial" / JOURNAL_NAME).open("a") as file:
        file.write(line + "\n")
    before = tree(source)
    for options in ({}, {"resume": True}):
        with contextlib.suppress(EndorError):
            enter(out, source, **options)
    write(out, source, overwrite=True)
    assert tree(out) == {"model.safetensors": "new"}
    assert tree(source) == before


def test_other_identity(tmp_path, source):
    leave(tmp_path / "out", source, 1, identity={"codec": "raw", "same": 1})
    changed = {"codec": "auto", "same": 1}
    with (
        pytest.raises(CheckpointError, match=r'codec was "raw" and is now "auto"'),
        OutputDirectory(tmp_path / "out", identity=changed, source=source, resume=True),
    ):
        pass
    assert (tmp_path / "out.partial" / CONTENT_NAME / shard(0)).exists()
    with OutputDirectory(tmp_path / "out", identity=changed, source=source, overwrite=True) as new:
        assert new.finished == []
        assert list(new.folder.iterdir()) == []


def test_resuming_drops_what_was_not_finished(tmp_path, source):
    out = tmp_path / "out"
    writes = {"config.json": None, "sub/a": None}
    with OutputDirectory(out, identity={"a": 1}, source=source, writes=writes) as output:
        (output.folder / shard(0)).write_text("x")
        output.finish_file({"file": shard(0)})
        (output.folder / "sub").mkdir()
        left = ["config.json", "sub/a", shard(1), ".endor-00002.safetensors.1.0.tmp"]
        for name in [*left, "endor-00009-of-00009.safetensors"]:
            (output.folder / name).write_text("half")
    with OutputDirectory(out, identity={"a": 1}, source=source, resume=True) as output:
        assert [path.name for path in output.folder.rglob("*")] == [shard(0)]


def test_two_at_once(tmp_path, source):
    out = tmp_path / "out"
    with OutputDirectory(out, identity={}, source=source):
        with (
            pytest.raises(CheckpointError, match="another process is writing"),
            OutputDirectory(out, identity={}, source=source, overwrite=True),
        ):
            pass
        assert (tmp_path / "out.partial").exists()


def test_a_lock_on_what_is_gone_is_no_lock(tmp_path, source, monkeypatch):
    """Another process publishes between our opening its journal and our getting the lock."""
    import fcntl

    out = tmp_path / "out"
    leave(out, source, 1)
    flock = fcntl.flock

    def late(fd, operation):
        (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another process"):
        write(out, source, overwrite=True)
    assert (tmp_path / "elsewhere" / CONTENT_NAME / shard(0)).exists()


def test_mount_points_and_the_root_are_refused(source):
    for path, match in (("/proc", "mount point"), ("/", "root of the file system")):
        with (
            pytest.raises((CheckpointError, OutputExistsError), match=match),
            OutputDirectory(Path(path), identity={}, source=source),
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


# ---- OUT.partial of others ---------------------------------------------------------------------


def a_folder(path, elsewhere):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def a_folder_with_a_journal(path, elsewhere):
    a_folder(path, elsewhere)
    (path / JOURNAL_NAME).write_text('{"day": 1}\n')


def a_journal_and_nothing_else(path, elsewhere):
    path.mkdir()
    (path / JOURNAL_NAME).write_text('{"day": 1}\n')


def half_a_journal(path, elsewhere):
    path.mkdir()
    (path / JOURNAL_NAME).write_text('{"endor diary')


def nested(path, elsewhere):
    (path / "a" / "b").mkdir(parents=True)


def a_file(path, elsewhere):
    path.write_text("mine")


def a_pipe(path, elsewhere):
    os.mkfifo(path)


def a_link(path, elsewhere):
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    path.symlink_to(elsewhere)


def a_link_to_nothing(path, elsewhere):
    path.symlink_to(elsewhere)


def a_linked_journal(path, elsewhere):
    path.mkdir()
    elsewhere.write_text('{"endor journal":1,"a":1}\n')
    (path / JOURNAL_NAME).symlink_to(elsewhere)


def a_hard_linked_journal(path, elsewhere):
    path.mkdir()
    elsewhere.write_text('{"endor journal":1,"a":1}\n')
    (path / JOURNAL_NAME).hardlink_to(elsewhere)


def a_piped_journal(path, elsewhere):
    path.mkdir()
    os.mkfifo(path / JOURNAL_NAME)


def a_linked_content(path, elsewhere):
    elsewhere.mkdir()
    (elsewhere / "endor-00001.safetensors").write_text("mine")
    path.mkdir()
    (path / JOURNAL_NAME).write_text('{"endor journal":1,"a":1}\n')
    (path / CONTENT_NAME).symlink_to(elsewhere)


@pytest.mark.parametrize(
    "make",
    [
        a_folder,
        a_folder_with_a_journal,
        a_journal_and_nothing_else,
        half_a_journal,
        nested,
        a_file,
        a_link,
        a_link_to_nothing,
        a_linked_journal,
        a_hard_linked_journal,
        a_linked_content,
    ],
)
def test_what_others_call_partial_is_not_touched(tmp_path, source, make):
    make(tmp_path / "out.partial", tmp_path / "elsewhere")
    refused(tmp_path / "out", source, r"out\.partial.*move it away, or choose another OUT")


@pytest.mark.parametrize("make", [a_pipe, a_piped_journal])
def test_a_pipe_is_not_waited_for(tmp_path, source, make):
    make(tmp_path / "out.partial", tmp_path / "elsewhere")
    with (
        pytest.raises(OutputExistsError, match=r"out\.partial"),
        OutputDirectory(tmp_path / "out", identity={}, source=source),
    ):
        pass


def test_another_users_directory_is_refused(tmp_path, source, monkeypatch):
    """Its journal is theirs to write: names and checksums in it prove nothing."""
    leave(tmp_path / "out", source, 1)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused(tmp_path / "out", source, "belongs to another user")


def test_strangers_in_our_own_directory_are_named(tmp_path, source):
    leave(tmp_path / "out", source, 1)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    refused(tmp_path / "out", source, r"holds notes\.txt, which Endor did not write")
    (tmp_path / "out.partial" / "notes.txt").rename(
        tmp_path / "out.partial" / CONTENT_NAME / "notes.txt"
    )
    refused(tmp_path / "out", source, r"content/notes\.txt, which Endor did not write")
    (tmp_path / "out.partial" / CONTENT_NAME / "notes.txt").unlink()
    (tmp_path / "out.partial" / CONTENT_NAME / "config.json").symlink_to(source / "weights")
    refused(tmp_path / "out", source, "content/config.json, which Endor did not write")


def test_an_empty_directory_is_taken(tmp_path, source):
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out", source)
    assert not (tmp_path / "out.partial").exists()


def test_the_source_is_never_partial(tmp_path):
    """`endor pack m.partial m`, and a source below it."""
    source = tmp_path / "m.partial" / "a" / "b"
    source.mkdir(parents=True)
    (source / "weights").write_text("precious")
    for path in (source, source.parent, source.parent.parent):
        refused(tmp_path / "m", path, "holds the input")
    (tmp_path / "link").symlink_to(source)
    refused(tmp_path / "m", tmp_path / "link", "holds the input")


def test_files_that_the_source_links_to_are_not_replaced(tmp_path, source):
    write(tmp_path / "out", source)
    (source / "model.safetensors").symlink_to(tmp_path / "out" / "model.safetensors")
    refused(tmp_path / "out", source, "holds the input")


# ---- OUT ---------------------------------------------------------------------------------------


def test_out_may_be_a_link_to_an_empty_directory(tmp_path, source):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/real")
    write(tmp_path / "out", source)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk") == {"real": "/", "real/model.safetensors": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "source"]


@pytest.mark.parametrize("kind", ["full", "file", "nothing", "itself"])
def test_out_as_another_link_is_refused(tmp_path, source, kind):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("old")
    (tmp_path / "file").write_text("mine")
    if kind != "itself":
        (tmp_path / "out").symlink_to(kind)
        refused(tmp_path / "out", source, "is a link")


STRANGERS = {
    "a file": lambda out: (out / "thesis.txt").write_text("mine"),
    "a folder": lambda out: (out / "src").mkdir(),
    "a file in a folder": lambda out: [(out / "src").mkdir(), (out / "src" / "a").write_text("x")],
    "code": lambda out: (out / "modeling_mine.py").write_text("pass"),
    "a hidden file": lambda out: (out / ".env").write_text("secret"),
    "a link": lambda out: (out / "config.json").symlink_to("/etc/hostname"),
    "other weights": lambda out: (out / "lora.safetensors").write_text("mine"),
    "a checkpoint of a trainer": lambda out: (out / "optimizer.pt").write_text("mine"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_only_what_endor_wrote_is_replaced(tmp_path, source, what):
    out = tmp_path / "out"
    write(out, source, "old")
    write(out, source, "newer", overwrite=True)
    assert tree(out) == {"model.safetensors": "newer"}
    STRANGERS[what](out)
    refused(out, source, "which Endor did not write, so it is not replaced", overwrite=True)


def test_a_folder_with_a_config_is_no_checkpoint(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    refused(tmp_path / "out", source, "holds no checkpoint", overwrite=True)


def test_a_companion_of_an_unusual_name_is_ours_if_it_is_the_same(tmp_path, source):
    out = tmp_path / "out"
    write(out, source)
    (source / "notes.txt").write_text("ours")
    writes = {"model.safetensors": None, "notes.txt": source / "notes.txt"}
    (out / "notes.txt").write_text("ours")
    check_output(out, source, writes=writes, overwrite=True)
    (out / "notes.txt").write_text("edited")
    refused(out, source, r"notes\.txt", writes=writes, overwrite=True)


def test_strangers_that_come_while_we_work(tmp_path, source):
    out = tmp_path / "out"
    write(out, source, "old")
    with pytest.raises(OutputExistsError, match=r"holds thesis\.txt"):
        write_and(out, source, lambda: (out / "thesis.txt").write_text("mine"), overwrite=True)
    assert tree(out) == {"model.safetensors": "old", "thesis.txt": "mine"}
    (out / "thesis.txt").unlink()
    write(out, source, overwrite=True, resume=True)
    assert tree(out) == {"model.safetensors": "new"}
    assert not (tmp_path / "out.partial").exists()


def write_and(out, source, meanwhile, **options):
    writes = {"model.safetensors": None}
    with OutputDirectory(out, identity={"a": 1}, source=source, writes=writes, **options) as output:
        (output.folder / "model.safetensors").write_text("new")
        output.finish_file({"file": "model.safetensors"})
        meanwhile()
        output.publish(["model.safetensors"])


def test_an_out_that_comes_while_we_work(tmp_path, source):
    out = tmp_path / "out"

    def make():
        out.mkdir()
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(OutputExistsError, match="exists already"):
        write_and(out, source, make)
    assert tree(out) == {"thesis.txt": "mine"}


# ---- failures and kills ------------------------------------------------------------------------


class Killed(BaseException):
    """The process is dead: nothing it calls after this does anything."""


CALLS = ["rename", "unlink", "rmdir", "mkdir", "write", "fsync", "ftruncate"]


class Calls:
    """Fails the n-th call that changes the disk, and all after it if that was a kill."""

    def __init__(self, monkeypatch, error, *, after=False):
        self.count = 0
        self.fatal = 1 << 30
        self.error = error
        self.after = after
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, function):
        def call(*args, **options):
            self.count += 1
            dead = isinstance(self.error, Killed) and self.count > self.fatal
            if dead or (self.count == self.fatal and not self.after):
                raise self.error
            result = function(*args, **options)
            if self.count == self.fatal:
                raise self.error
            return result

        return call


def runs(tmp_path, source, error, monkeypatch, after, old):
    """Yield the state after a run that failed at its n-th call, for every n."""
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        out = folder / "out"
        if old:
            write(out, source, "old")
        with monkeypatch.context() as patch:
            calls = Calls(patch, error, after=after)
            calls.fatal = number
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    write(out, source, overwrite=old)
                failed = None
            except (Killed, OSError) as caught:
                failed = caught
        yield out, failed, said
        if calls.count < number:
            return


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere(tmp_path, source, monkeypatch, after, old):
    """No state loses the old checkpoint, and the next run leaves nothing but its own."""
    states = set()
    for out, failed, _ in runs(tmp_path, source, Killed(), monkeypatch, after, old):
        replaced = out.with_name("out.partial") / REPLACED_NAME
        states.add((out.exists(), replaced.exists()))
        if out.exists():
            assert tree(out)["model.safetensors"] in {"old", "new"}
        if old and not out.exists():
            assert tree(replaced) == {"model.safetensors": "old"}
        text = tree(out)["model.safetensors"] if out.exists() else "old"
        if old or out.exists():
            with pytest.raises(OutputExistsError, match=r"exists already|unfinished run"):
                write(out, source)
            assert tree(out) == {"model.safetensors": text}
            assert not replaced.exists()
            write(out, source, "again", overwrite=True)
        else:
            write(out, source, "again", resume=True)
        if failed is None:
            assert text == "new"
        assert tree(out.parent) == {"out": "/", "out/model.safetensors": "again"}
    assert ((False, True) in states) is old


@pytest.mark.parametrize("old", [False, True])
def test_a_failure_anywhere(tmp_path, source, monkeypatch, old):
    """An error says that OUT is as it was; success, that it is new, whatever failed afterwards."""
    warned = failures = 0
    for out, failed, said in runs(
        tmp_path, source, OSError(5, "Input/output error"), monkeypatch, False, old
    ):
        if failed is None:
            assert tree(out) == {"model.safetensors": "new"}
            for warning in said:
                assert warning.category is EndorWarning
                assert "is complete, but tidying up failed" in str(warning.message)
                warned += 1
        else:
            failures += 1
            assert tree(out) == ({"model.safetensors": "old"} if old else {})
        with contextlib.suppress(OutputExistsError):
            check_output(out, source)
        if failed is None:
            assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert warned > 2
    assert failures > 5


def test_a_failed_rename_restores_what_was_there(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    write(out, source, "old")
    rename = os.rename

    def fail(path, target, **options):
        if path == CONTENT_NAME:
            raise OSError(28, "No space left on device", str(path))
        rename(path, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write(out, source, overwrite=True)
    assert str(caught.value.filename) == str(out)
    assert tree(out) == {"model.safetensors": "old"}


def test_what_was_replaced_is_kept_when_there_is_a_new_one(tmp_path, source):
    """Killed between the two renames, and then the user made another OUT."""
    out = tmp_path / "out"
    write(out, source, "old")
    leave(out.with_name("other"), source, 1)
    out.with_name("other.partial").rename(tmp_path / "out.partial")
    with (tmp_path / "out.partial" / JOURNAL_NAME).open("a") as file:
        file.write('{"publishing":["model.safetensors"]}\n')
    out.rename(tmp_path / "out.partial" / REPLACED_NAME)
    write(tmp_path / "fresh", source, "users")
    (tmp_path / "fresh").rename(out)
    refused(out, source, "there is a new one")


def test_removal_spares_what_was_put_into_the_replaced(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    write(out, source, "old")

    def sync(path):
        if path == tmp_path:
            (tmp_path / "out.partial" / REPLACED_NAME / "thesis.txt").write_text("mine")

    monkeypatch.setattr(module, "sync_directory", sync)
    with pytest.warns(EndorWarning, match="thesis"):
        write(out, source, overwrite=True)
    assert tree(out) == {"model.safetensors": "new"}
    assert tree(tmp_path / "out.partial" / REPLACED_NAME) == {"thesis.txt": "mine"}

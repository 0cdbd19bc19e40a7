"""Limits of control groups, at every level, in both versions, wherever they are mounted."""

import pytest

from endor.planning import available_bytes
from endor.planning.limits import group_limits

GB = 10**9
V1_MAX = 9223372036854771712
V2 = "30 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
OWN_V1 = "5:cpu,cpuacct:/x\n4:memory:/a/b/c\n0::/\n"
ROOT = "sys/fs/cgroup"


def fake(root, *, meminfo=16 * GB, cgroup="", mounts="", files=None):
    """Make a root folder with a process, its groups and their limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {meminfo // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize("level", ["", "/a", "/a/b", "/a/b/c"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_version_2_at_every_level(tmp_path, level, name):
    files = {f"{ROOT}{at}/memory.max": "max" for at in ("/a", "/a/b", "/a/b/c")}
    files[f"{ROOT}{level}/{name}"] = 3 * GB
    root = fake(tmp_path, cgroup="0::/a/b/c\n", mounts=V2, files=files)
    assert available_bytes(root) == 27 * GB // 10


@pytest.mark.parametrize("level", ["", "/a", "/a/b", "/a/b/c"])
def test_version_1_at_every_level(tmp_path, level):
    files = {f"{ROOT}/memory{at}/memory.limit_in_bytes": V1_MAX for at in ("", "/a", "/a/b/c")}
    files[f"{ROOT}/memory{level}/memory.limit_in_bytes"] = 3 * GB
    root = fake(tmp_path, cgroup=OWN_V1, mounts=V1, files=files)
    assert available_bytes(root) == 27 * GB // 10


def test_the_smallest_counts_without_what_is_used(tmp_path):
    files = {
        f"{ROOT}/a/memory.max": 5 * GB,
        f"{ROOT}/a/memory.current": 4 * GB,
        f"{ROOT}/a/memory.stat": f"anon 5\ninactive_file {GB}",
        f"{ROOT}/a/b/memory.max": 4 * GB,
        f"{ROOT}/a/b/memory.current": GB,
    }
    root = fake(tmp_path, cgroup="0::/a/b\n", mounts=V2, files=files)
    assert {str(path.relative_to(root)): left for path, left in group_limits(root)} == {
        f"{ROOT}/a": 2 * GB,
        f"{ROOT}/a/b": 3 * GB,
    }
    assert available_bytes(root) == 18 * GB // 10


def test_a_container_whose_group_is_the_mount(tmp_path):
    """Without a namespace of its own: the path is the host's, the mount begins at that path."""
    mounts = V1.replace(" / /sys", " /docker/d /sys").replace("/cgroup/memory", "/cg\\040m")
    files = {
        "sys/fs/cg m/memory.limit_in_bytes": 3 * GB,
        "sys/fs/cg m/sub/memory.limit_in_bytes": 2 * GB,
    }
    root = fake(tmp_path, cgroup="4:memory:/docker/d/sub\n", mounts=mounts, files=files)
    assert available_bytes(root) == 18 * GB // 10


def test_both_versions_at_once(tmp_path):
    files = {
        f"{ROOT}/unified/x/memory.max": "max",
        f"{ROOT}/memory/a/memory.limit_in_bytes": 2 * GB,
    }
    mounts = V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    root = fake(tmp_path, cgroup="4:memory:/a\n0::/x\n", mounts=mounts, files=files)
    assert available_bytes(root) == 18 * GB // 10


@pytest.mark.parametrize(
    ("cgroup", "mounts"),
    [("", ""), ("nonsense", "nonsense"), ("0::/../..\n", V2), ("0::/gone\n", V2), ("\0:", V1)],
)
def test_what_is_not_there_limits_nothing(tmp_path, cgroup, mounts):
    root = fake(tmp_path, meminfo=1024 * 10_000, cgroup=cgroup, mounts=mounts)
    assert available_bytes(root) == 1024 * 9000


def test_a_group_that_is_full(tmp_path):
    files = {f"{ROOT}/memory.max": 0, f"{ROOT}/memory.current": 5}
    root = fake(tmp_path, cgroup="0::/\n", mounts=V2, files=files)
    assert available_bytes(root) == 0

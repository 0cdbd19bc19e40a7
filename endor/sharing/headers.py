"""Headers of a model on the Hub without its weights: to plan for what nobody has fetched."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.located import fetched
from endor.errors import HubError
from endor.hub.client import Repository, look_up, patiently, read_part
from endor.hub.names import HubName, hub_name
from endor.jsontext import read_object

MAX_HEADER_BYTES = 100 << 20
"""What the safetensors library takes."""

_PROBE_BYTES = 64 << 20
_FIRST_BYTES = 1 << 16
"""Asked for at once; most headers are shorter, and need no second question."""


def read_head(repository: Repository, file: str) -> bytes:
    """Return the length and the header of a safetensors file on the Hub, unchecked otherwise.

    Raises:
        HubError: It cannot be had, or has no header.
    """
    nbytes = repository.files[file].nbytes
    head = read_part(repository, file, 0, min(_FIRST_BYTES, nbytes)) if nbytes else b""
    length = int.from_bytes(head[:8], "little") + 8
    if nbytes < 8 or length > min(nbytes, MAX_HEADER_BYTES):
        raise HubError(f"{repository.name}: {file}: is no safetensors file; is it damaged there?")
    if length > len(head):
        head += read_part(repository, file, len(head), length)
    return head[:length]


def write_head(head: bytes, nbytes: int, path: Path) -> None:
    """Write a file of `nbytes` of which only the header is there, and takes room."""
    with path.open("xb") as file:
        file.write(head)
        file.truncate(nbytes)


@contextmanager
def headers_at_hand(
    model: Path, revision: str | None = None, *, probe: bool = False
) -> Iterator[tuple[Path, Path | None]]:
    """Yield where to read the config and the headers of a model, and a file to measure by.

    Of a model on the Hub that is not in the cache, config and headers are fetched. Weights are
    holes in files that exist only inside this context.

    Args:
        model: A path, or an id of the Hub.
        revision: A branch, tag or commit there.
        probe: Whether such files need another one, by which the disk can be measured.

    Raises:
        ConfigError, HubError: As for `located`.
    """
    name = hub_name(model, revision)
    if name is None:
        yield model, None
        return
    folder = fetched(name, weights=False)
    index = folder / PACKED_INDEX_NAME
    if not index.is_file():
        yield folder, None
        return
    shards = sorted(set(read_object(index, lenient=True).get("weight_map", {}).values()))
    if all((folder / shard).is_file() for shard in shards):
        yield folder, None
        return
    pinned = HubName(name.repo, folder.name)
    repository = patiently(lambda: look_up(pinned))
    cache = folder.parent.parent.parent
    with TemporaryDirectory(prefix="endor-plan-", dir=cache, ignore_cleanup_errors=True) as made:
        here = Path(made) / name.repo.partition("/")[2]
        here.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.name not in shards:
                (here / file.name).symlink_to(file.resolve())
        for shard in shards:
            if shard not in repository.files or "/" in shard:
                raise HubError(f"{name}: {PACKED_INDEX_NAME} lists {shard}, which is not there")
            head = read_head(repository, shard)
            write_head(head, repository.files[shard].nbytes, here / shard)
        measured = None
        if probe:
            measured = Path(made) / "probe"
            measured.write_bytes(secrets.token_bytes(_PROBE_BYTES))
        yield here, measured

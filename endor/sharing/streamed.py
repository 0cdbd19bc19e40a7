"""A model on the Hub whose shards are fetched while earlier ones are packed, and deleted behind.

Config, tokenizer and headers come first: a conversion knows every tensor before it begins. Then it
says which tensors it will read, in order (`expect`); one thread fetches the shards of these, one
after the other, no more at once than the order of reading needs and one ahead. A shard goes when
its last tensor was read. Only what is left to read is fetched when a run is resumed.
"""

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from endor.checkpoint.composite import is_composite
from endor.checkpoint.directory import CONFIG_NAME, choose, read_config
from endor.checkpoint.located import fetched, weight_files
from endor.checkpoint.sources.bitmask import has_bitmasks
from endor.checkpoint.sources.contract import SourceTensor
from endor.checkpoint.sources.safetensors import SafetensorsSource
from endor.errors import CheckpointError, HubError
from endor.hub.client import Repository, look_up, patiently
from endor.hub.names import HubName
from endor.hub.transfer import Cancelled, fetch
from endor.sharing.headers import read_head, write_head
from endor.storage.positioned import read_at

AHEAD = 1
"""Shards that are fetched before they are needed."""


class StreamedSource:
    """A model on the Hub, read shard after shard.

    Args:
        name: The model.
        folder: Where shards lie while they are needed; made when the first one comes.

    Attributes:
        path: Its small files, in the cache; for messages.
        directory: The same.
        tensors: By name.
        repository: The model at its commit.

    Raises:
        HubError: It cannot be had, or is no model of safetensors.
        CheckpointError: It contradicts itself.
    """

    ordered = False

    def __init__(self, name: HubName, folder: Path) -> None:
        small = fetched(name, weights=False)
        pinned = HubName(name.repo, small.name)
        self.repository: Repository = patiently(lambda: look_up(pinned))
        self.path = self.directory = small
        self._folder = folder
        if is_composite(small):
            raise HubError(f"{name}: holds several models; --stream takes one, so leave it out")
        files = weight_files(self.repository, small)
        if not all(file.endswith(".safetensors") for file in files):
            raise HubError(f"{name}: --stream takes safetensors, and this is {files[0]}")
        self.tensors, self._places = self._read_headers(small, files)
        self._numbers = {file: number for number, file in enumerate(sorted(files), start=1)}
        self._changed = threading.Condition()
        self._left: Counter[str] = Counter(place[0] for place in self._places.values())
        self._order: list[str] = list(self._left)
        self._wanted: set[str] = set()
        self._here: dict[str, int] = {}
        self._readers: Counter[str] = Counter()
        self._limit = len(files)
        self._most = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _read_headers(
        self, small: Path, files: Sequence[str]
    ) -> tuple[Mapping[str, SourceTensor], dict[str, tuple[str, int]]]:
        """Return the tensors, and file and offset of each, as a whole checkpoint would have them.

        The headers are put into files of full size that hold nothing else, so that the same code
        reads and checks them.
        """
        with TemporaryDirectory(prefix="endor-") as made:
            root = Path(made) / self.repository.name.repo.partition("/")[2]
            root.mkdir()
            for path in small.iterdir():
                index = path.name.endswith(".safetensors.index.json")
                if index or path.name == CONFIG_NAME:
                    (root / path.name).symlink_to(path.resolve())
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                head = read_head(self.repository, file)
                write_head(head, self.repository.files[file].nbytes, root / file)
            choice = choose(root)
            if choice.kind != "safetensors":
                raise HubError(
                    f"{self.repository.name}: is packed already; --stream takes dense models"
                )
            source = SafetensorsSource(root, root, choice, once=True)
            try:
                if has_bitmasks(source):
                    raise HubError(
                        f"{self.repository.name}: stores bitmasks, of which --stream takes none; "
                        "leave it out"
                    )
                places = {
                    name: (path.relative_to(root).as_posix(), offset)
                    for name, (path, offset) in source.places.items()
                }
                return dict(source.tensors), places
            finally:
                source.close()

    # ---- what a conversion asks for ------------------------------------------------------------

    def expect(self, names: Sequence[str]) -> int:
        """Begin to fetch what these tensors need, which are read once each, about in this order.

        Returns:
            Shards that will be on disk at once, at most.
        """
        files = [self._places[name][0] for name in names]
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for place, file in enumerate(files):
            first.setdefault(file, place)
            last[file] = place
        live = max(
            (sum(first[other] <= at <= last[other] for other in first) for at in first.values()),
            default=0,
        )
        with self._changed:
            self._order = sorted(first, key=first.__getitem__)
            self._left = Counter(files)
            self._limit = live + AHEAD
        self._forget_others()
        return min(self._limit, len(first))

    def read_into(self, name: str, out: np.ndarray) -> None:
        file, offset = self._places[name]
        fd = self._borrow(file)
        try:
            done = read_at(fd, out.data.cast("B"), offset, self._target(file))
        finally:
            self._give_back(file)
        if done < out.nbytes:
            raise CheckpointError(f"{self._target(file)}: was changed while it was read")

    def cancel(self) -> None:
        """Stop fetching; whoever waits is told so."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    @property
    def most_shards(self) -> int:
        """Shards that were on disk at once, at most, so far."""
        return self._most

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return str(self.repository)

    def close(self) -> None:
        self.cancel()
        if self._thread is not None:
            self._thread.join()
        for fd in self._here.values():
            os.close(fd)
        self._here.clear()

    # ---- shards --------------------------------------------------------------------------------

    def _target(self, file: str) -> Path:
        return self._folder / f"shard-{self._numbers[file]:05d}"

    def _borrow(self, file: str) -> int:
        """Return a descriptor of a shard, after waiting for it."""
        with self._changed:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(
                    target=self._fetch_all, name="endor-download", daemon=True
                )
                self._thread.start()
            self._wanted.add(file)
            if file not in self._here and file not in self._order:
                self._order.insert(0, file)  # read once more than was said
            self._changed.notify_all()
            while file not in self._here:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise Cancelled(f"{self.repository.name}: reading was interrupted")
                self._changed.wait()
            self._readers[file] += 1
            return self._here[file]

    def _give_back(self, file: str) -> None:
        """Note that a tensor was read; delete its shard if that was the last one."""
        with self._changed:
            self._readers[file] -= 1
            self._left[file] -= 1
            if self._left[file] > 0 or self._readers[file]:
                return
            os.close(self._here.pop(file))
            self._wanted.discard(file)
            self._target(file).unlink(missing_ok=True)
            self._changed.notify_all()

    def _fetch_all(self) -> None:
        """Fetch shard after shard, on a thread of its own."""
        try:
            while (file := self._next()) is not None:
                target = self._target(file)
                self._folder.mkdir(exist_ok=True)
                if not target.exists():
                    fetch(self.repository, file, target, wait=self._stop.wait)
                fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with self._changed:
                    self._here[file] = fd
                    self._order.remove(file)
                    self._most = max(self._most, len(self._here))
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> str | None:
        """Return the next shard, once there is room for it or somebody waits for it."""
        with self._changed:
            while not self._stop.is_set():
                if self._order:
                    waited = [file for file in self._order if file in self._wanted]
                    if len(self._here) < self._limit:
                        return self._order[0]
                    if waited:
                        return waited[0]
                self._changed.wait()
        return None

    def _forget_others(self) -> None:
        """Remove shards of an earlier run that nothing needs any more."""
        if not self._folder.is_dir():
            return
        kept = {self._target(file).name for file in self._order}
        for path in self._folder.iterdir():
            if path.name.removesuffix(".part") not in kept:
                path.unlink()

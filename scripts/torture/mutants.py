"""Mutated files and directories: a reader refuses them, or reads what was there."""

import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from child import run
from conversions import Result, pack
from models import weights, write

BATCH = 250
ADDRESS_BYTES = 2 << 30

HOSTILE: list[Any] = [None, True, -1, 0, 1, 2**31, 2**62, 2**63, 2**64, 10**30, 1e308, 0.5]
HOSTILE += ["", "x", "a\0b", "../x", "\x1b[31m", [], {}, [[]], [1] * 40, {"a": 1}, "\ud800"]
TOKENS = [b"9" * 5000, b"[" * 100_000, b"{", b'"', b"NaN", b"\\ud800", b"\0", b"-", b",", b"null"]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with one thing wrong with it."""
    data = bytearray(content)
    # Headers and indexes, where most of the rules are, are small beside the weights.
    place = rng.randrange(min(len(data), rng.choice((64, 2048, len(data)))) or 1)
    kind = rng.randrange(6)
    if kind == 0 and data:
        for _ in range(rng.randrange(1, 9)):
            data[(place + rng.randrange(64)) % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.choice(TOKENS)
    elif kind == 3:
        del data[place : place + rng.randrange(1, 4097)]
    elif kind == 4:
        size = rng.randrange(1, 4097)
        data[place : place + size] = bytes(len(data[place : place + size]))
    else:
        size = rng.randrange(1, 257)
        source = rng.randrange(len(data) or 1)
        data[place : place + size] = data[source : source + size]
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one node replaced, removed, repeated or renamed."""
    places = list(_places(value))
    if not places:
        return rng.choice(HOSTILE)
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif kind == 1:
        parent[str(rng.choice(HOSTILE))] = parent.pop(key)
    elif kind == 2 and type(parent[key]) is int:
        parent[key] += rng.choice((-4096, -256, -1, 1, 8, 256, 4096))
    elif kind == 3:
        other, name = rng.choice(places)
        parent[key] = json.loads(json.dumps(other.get(name))) if isinstance(other, dict) else 0
    else:
        parent[key] = rng.choice(HOSTILE)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def reseal(content: bytes, rng: random.Random) -> bytes:
    """Return a packed file with a changed header or payload, and all checksums right again."""
    from endor.storage.checksum import checksum
    from endor.storage.seal import finish

    start = 8 + int.from_bytes(content[:8], "little")
    document = json.loads(content[8:start])
    directory = json.loads(document["__metadata__"]["endor"])
    data = bytearray(content[start:])
    kind = rng.randrange(3)
    if kind == 0:
        directory = mutate_json(directory, rng)
    elif kind == 1:
        metadata = document.pop("__metadata__")
        document = {"__metadata__": metadata, **mutate_json(document, rng)}
    else:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 255, rng.randrange(256)))
        for record in directory["records"].values():
            offset, length, _ = record
            record[2] = checksum(bytes(data[offset - start : offset - start + length]))
    document["__metadata__"]["endor"] = json.dumps(directory, separators=(",", ":"))
    document["__metadata__"]["endor.checksum"] = "0" * 16
    blank = json.dumps(document, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if 8 + len(blank) > start:
        return content
    return finish(blank, start) + bytes(data)


def read_file(path: Path) -> dict[str, bytes]:
    """Return the bits of every tensor of a packed file, all checks made."""
    from endor import kernels
    from endor.storage import bind_checked, open_reader, verify_file
    from endor.storage.verify import read_records

    layout = verify_file(path)
    found = {}
    with open_reader() as reader:
        for record, data in read_records(layout, reader):
            for name in record.tensors:
                encoded = bind_checked(layout, name, data)
                out = np.empty(encoded.spec.numel, dtype=encoded.spec.dtype.uint)
                kernels.decode(encoded, out, threads=1)
                found[name] = out.tobytes()
    return found


def read_directory(path: Path) -> dict[str, bytes]:
    """Return the bits of every tensor of a checkpoint, its config and its companions."""
    from endor.checkpoint import open_source
    from endor.checkpoint.companions import find_companions

    found = {}
    with closing(open_source(path)) as source:
        source.config()
        find_companions(source)
        for name, tensor in source.tensors.items():
            out = np.empty(tensor.nbytes, dtype=np.uint8)
            source.read_into(name, out)
            found[name] = out.tobytes()
    return found


def file_campaign(work: Path, count: int, seed: int) -> Result:
    """Mutate packed files: half of them as damage does, half with right checksums."""
    folder = work / "files"

    def make() -> None:
        write(folder / "m", weights(2, 96, 64, 5))
        for codec in ("raw", "exp"):
            pack(folder / "m", folder / codec, codec=codec)

    made = run(make)
    assert made.status == 0, made.text
    files = [next((folder / codec).glob("endor-*")) for codec in ("raw", "exp")]
    bases = [(file.read_bytes(), read_file(file)) for file in files]
    result = Result("mutated packed files")
    began = time.monotonic()
    for first in range(0, count, BATCH):
        seeds = range(seed + first, seed + min(first + BATCH, count))
        _batch(work, result, seeds, lambda path, rng: _one_file(path, bases, rng))
    result.seconds = time.monotonic() - began
    return result


def _one_file(path: Path, bases: list[tuple[bytes, dict[str, bytes]]], rng: random.Random) -> str:
    from endor.errors import EndorError

    base, wanted = rng.choice(bases)
    file = path / "x.safetensors"
    sealed = rng.random() < 0.5
    file.write_bytes(reseal(base, rng) if sealed else mutate_bytes(base, rng))
    try:
        found = read_file(file)
    except EndorError:
        return "refused"
    if not sealed and found != wanted:
        raise AssertionError("damage was not noticed")
    return "read"


def directory_campaign(work: Path, count: int, seed: int) -> Result:
    """Mutate one file of a checkpoint: config, index, header or weights; three kinds of these."""
    folder = work / "directories"

    def make() -> None:
        state = weights(2, 32, 48, 6)
        write(folder / "one", state)
        write(folder / "sharded", state, shards=2)
        write(folder / "bin", state, kind="bin")
        write(folder / "bins", state, shards=2, kind="bin")
        pack(folder / "one", folder / "packed")

    made = run(make)
    assert made.status == 0, made.text
    result = Result("mutated directories and .bin files")
    began = time.monotonic()
    for first in range(0, count, BATCH):
        seeds = range(seed + first, seed + min(first + BATCH, count))
        _batch(work, result, seeds, lambda path, rng: _one_directory(path, folder, rng))
    result.seconds = time.monotonic() - began
    return result


def _one_directory(path: Path, folder: Path, rng: random.Random) -> str:
    from endor.errors import EndorError

    kind = rng.choice(("one", "sharded", "bin", "bins", "packed"))
    target = path / "m"
    shutil.copytree(folder / kind, target)
    try:
        files = sorted(target.iterdir())
        shards = [file for file in files if file.suffix in {".safetensors", ".bin"}]
        indexes = [file for file in files if file.name.endswith("index.json")]
        file = rng.choice(rng.choice([files, shards, indexes or shards]))
        if file.suffix == ".json" and rng.random() < 0.7:
            changed = mutate_json(json.loads(file.read_text()), rng)
            _reseal_index(file, changed, rng)
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))
        try:
            read_directory(target)
        except EndorError:
            return "refused"
        except OSError as error:  # a name that the file system does not take
            return f"OSError {error.errno}"
        return "read"
    finally:
        shutil.rmtree(target)


def _reseal_index(file: Path, changed: Any, rng: random.Random) -> None:
    from endor.checkpoint import index

    if file.name == "endor.safetensors.index.json" and rng.random() < 0.8:
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            changed["metadata"]["endor"]["checksum"] = index._checksum(changed)
    file.write_bytes(json.dumps(changed).encode())


def _batch(work: Path, result: Result, seeds: range, one: Any) -> None:
    """Try `seeds` in one child; where it dies, go on behind the seed that killed it."""
    left = list(seeds)
    log = work / "log"
    while left:
        log.write_text("")

        def act(todo: list[int] = left) -> None:
            warnings.simplefilter("ignore")
            path = Path(tempfile.mkdtemp(dir=work))
            with log.open("a", buffering=1) as file:
                for seed in todo:
                    file.write(f"{seed} ")
                    try:
                        file.write(f"{one(path, random.Random(seed))}\n")
                    except Exception as error:
                        file.write(f"BROKEN {type(error).__name__}: {error!r:.300}\n")
            shutil.rmtree(path)

        ended = run(act, address_bytes=ADDRESS_BYTES, seconds=300)
        lines = log.read_text().splitlines()
        for line in lines:
            seed, _, outcome = line.partition(" ")
            if outcome.startswith("BROKEN") or not outcome:
                text = outcome or f"signal {ended.signal}: {ended.text[-500:]}"
                result.add("broken", text, f"seed {seed}")
            else:
                result.add(outcome)
        if not lines:
            result.failures.append(f"a batch ended at once: {ended}")
            return
        left = left[len(lines) :]

"""What is asked of the Hub: a model's files at one commit, parts of them, and errors in a line."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from endor.errors import BackendError, EndorError, HubError
from endor.hub.names import HubName

CONNECT_TIMEOUT_S = 20.0
"""Silence after which a connection is given up, and tried again."""

_NO_NETWORK = {"TransportError", "TimeoutException", "ConnectionError", "Timeout", "RequestError"}
"""Classes of errors, by name: huggingface_hub changed its HTTP library more than once."""


class BrokenOff(HubError):
    """A connection that ended early, or a Hub that is busy: what may work when tried again.

    Attributes:
        after_s: When the Hub said so.
    """

    after_s: float | None = None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a model on the Hub.

    Attributes:
        name: Its path in the repository.
        nbytes: Its size.
        sha256: Hash of its content where the Hub keeps one, as it does of large files.
    """

    name: str
    nbytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the Hub at one commit, whatever becomes of its branches.

    Attributes:
        name: As it was given.
        commit: The commit that this meant when it was asked for.
        files: By name.
    """

    name: HubName
    commit: str
    files: Mapping[str, RemoteFile]

    def __str__(self) -> str:
        return f"{self.name.repo}@{self.commit}"


def hub() -> Any:
    """Return huggingface_hub.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils  # none of which comes by itself
    except ImportError:
        raise BackendError(
            "models on the Hub need huggingface_hub; install it: pip install 'endor-sparse[hub]'"
        ) from None
    return huggingface_hub


def look_up(name: HubName) -> Repository:
    """Return a model's commit and files.

    Raises:
        HubError: There is no such model or revision, or it cannot be reached.
    """
    with hub_errors(name):
        info = hub().HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    files = {}
    for found in info.siblings or ():
        sha256 = getattr(found.lfs, "sha256", None) if found.lfs else None
        files[found.rfilename] = RemoteFile(found.rfilename, int(found.size or 0), sha256)
    if not info.sha or not files:
        raise HubError(f"{name}: the Hub knows this model, and it holds no files")
    return Repository(name, info.sha, files)


@contextmanager
def opened(repository: Repository, file: str, start: int, stop: int) -> Iterator[Iterator[bytes]]:
    """Yield an iterator over bytes `start` to `stop` of a file, as they come.

    What comes may end early. That the server sent this part of this file, and no other, is checked.

    Raises:
        HubError: See `hub_errors`.
    """
    library = hub()
    url = library.hf_hub_url(repository.name.repo, file, revision=repository.commit)
    headers = dict(library.utils.build_hf_headers())
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    where = f"{repository.name}: {file}"
    with hub_errors(repository.name, file):
        session = library.utils.get_session()
        with session.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=CONNECT_TIMEOUT_S
        ) as response:
            if response.status_code >= 400:
                response.read()
            library.utils.hf_raise_for_status(response)
            whole = repository.files[file].nbytes
            if response.status_code == 206:
                said = response.headers.get("content-range", "")
                if said.lower() != f"bytes {start}-{stop - 1}/{whole}":
                    raise HubError(
                        f"{where}: must have {whole} bytes, of which {start} to {stop - 1} were "
                        f"asked for; the server sends {said or 'something else'}; try again"
                    )
            elif start or stop != whole:
                raise HubError(f"{where}: the server sends no parts of files; leave out --stream")
            yield response.iter_bytes()


def read_part(repository: Repository, file: str, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` of a file.

    Raises:
        HubError: They cannot be had.
    """

    def once() -> bytes:
        with opened(repository, file, start, stop) as pieces:
            found = b"".join(pieces)
        if len(found) != stop - start:
            raise BrokenOff(f"{repository.name}: {file}: the connection ended early; try again")
        return found

    found: bytes = patiently(once)
    return found


def patiently(action: Callable[[], Any], *, wait: Callable[[float], Any] | None = None) -> Any:
    """Return what `action` returns, tried again while the Hub is busy or connections end.

    Args:
        action: What to do; takes nothing.
        wait: Waits so many seconds; true gives up.
    """
    wait = wait or time.sleep
    for pause in (1.0, 2.0, 4.0, 8.0):
        try:
            return action()
        except BrokenOff as error:
            if wait(min(error.after_s or pause, 300.0)):
                raise
    return action()


@contextmanager
def hub_errors(name: HubName, file: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence.

    Raises:
        HubError: No such model, revision or file; no access; no connection; offline; a busy Hub,
            or one that answers nonsense. `BrokenOff` where trying again may help.
    """
    from importlib import import_module

    kinds = import_module("huggingface_hub.errors") if hub() else None
    where = f"{name}: {file}" if file else str(name)
    try:
        yield
    except (EndorError, MemoryError):
        raise
    except Exception as error:
        raise _said(error, kinds, name, where) from None


def _said(error: Exception, kinds: Any, name: HubName, where: str) -> Exception:
    cause = error.__cause__
    if isinstance(error, (kinds.LocalEntryNotFoundError, RuntimeError)) and isinstance(
        cause, Exception
    ):
        return _said(cause, kinds, name, where)  # why the Hub was not asked, or did not answer
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, kinds.GatedRepoError):
        return HubError(
            f"{where}: is gated: accept its licence at {_page(name)} and set HF_TOKEN to a token "
            "of that account"
        )
    if isinstance(error, kinds.RevisionNotFoundError):
        return HubError(
            f"{where}: has no revision {name.revision or 'main'}; see {_page(name)} for branches "
            "and tags"
        )
    if isinstance(error, kinds.OfflineModeIsEnabled) or _offline():
        return HubError(
            f"{where}: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, or "
            "give a folder"
        )
    if isinstance(error, kinds.LocalEntryNotFoundError):
        return HubError(
            f"{where}: is not in the cache, and the Hub cannot be reached; connect, or give a "
            "folder"
        )
    if isinstance(error, kinds.EntryNotFoundError):
        return HubError(f"{where}: the Hub has no such file; has the revision changed? try again")
    if isinstance(error, kinds.RepositoryNotFoundError):
        return HubError(
            f"{where}: neither a folder here nor a model on the Hub that may be seen; check the "
            "spelling, and set HF_TOKEN if it is private"
        )
    if status in (401, 403):
        return HubError(
            f"{where}: the Hub refuses access ({status}); set HF_TOKEN to a token that may do this"
        )
    if status == 429:
        busy = BrokenOff(f"{where}: the Hub says that there were too many requests (429); wait")
        busy.after_s = _retry_after(error)
        return busy
    if status is not None and status >= 500:
        return BrokenOff(f"{where}: the Hub fails ({status}); try again later")
    if status is not None:
        return HubError(f"{where}: the Hub refuses ({status}): {_brief(error)}")
    if isinstance(error, kinds.HFValidationError):
        return HubError(f"{where}: is no id that the Hub allows: {_brief(error)}")
    kind = {base.__name__ for base in type(error).__mro__}
    if kind & _NO_NETWORK:
        return BrokenOff(
            f"{where}: the Hub cannot be reached ({_brief(error)}); connect, or give a folder"
        )
    if isinstance(error, OSError):
        return error
    return HubError(f"{where}: what the Hub sent makes no sense ({_brief(error)}); try again")


def _retry_after(error: Exception) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(str(headers.get("retry-after")))
    except ValueError:
        return None


def _offline() -> bool:
    return bool(hub().constants.HF_HUB_OFFLINE)


def _page(name: HubName) -> str:
    return f"{hub().constants.ENDPOINT}/{name.repo}"


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."

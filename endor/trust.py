"""What transformers makes of a checkpoint's small files; its code runs only if it is trusted.

transformers asks on a terminal whether code may run unless it is told yes or no. Here it is always
told, and every way in which such files can be wrong is an error of one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endor.errors import CheckpointError, ConfigError, EndorError


def read_model_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the config that transformers makes of a checkpoint's config.json.

    Raises:
        ConfigError: transformers does not know the architecture, or finds the file malformed.
    """
    import transformers

    with one_line_errors(path, "transformers does not take its config.json"):
        return transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )


def read_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        CheckpointError: It has none that loads.
        ConfigError: It needs code that is not trusted.
    """
    import transformers

    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; give a directory with config.json")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of any type: its files, and perhaps its code, are the checkpoint's
        if _wants_trust(error):
            raise _untrusted(path) from error
        reason = _first_line(error) or type(error).__name__
        raise CheckpointError(
            f"{path}: the tokenizer must lie beside the weights, and does not load: {reason}"
        ) from error


@contextmanager
def one_line_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint's content into a `ConfigError`.

    Endor's own errors, and the system's, pass as they are.
    """
    try:
        yield
    except (EndorError, OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error.__cause__, EndorError):
            raise error.__cause__ from None
        if _wants_trust(error):
            raise _untrusted(path) from error
        raise ConfigError(
            f"{path}: {what}: {type(error).__name__}: {_first_line(error)[:300]}; "
            "is it of a newer transformers?"
        ) from error


def _wants_trust(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _untrusted(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: needs Python code that comes with the checkpoint; read it, then allow it "
        "with trust_remote_code=True (--trust-remote-code)"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")

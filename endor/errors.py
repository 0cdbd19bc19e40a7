"""Every error that a caller of Endor can cause.

EndorError
├── FormatError            the bytes of a packed file or tensor break the format
│   ├── TruncatedError     a file ends before its own header says
│   └── ChecksumError      the bytes differ from their recorded checksum
├── ShapeError             a buffer or tensor has the wrong shape or layout
├── DTypeError             an element type that the operation does not take
├── CheckpointError        a checkpoint directory is incomplete or contradicts itself
│   ├── OutputExistsError  the output is there already
│   ├── BusyError          another process is writing the output
│   └── HubError           a model on the Hub cannot be had, or nothing put there
├── ReadError              the operating system failed to deliver bytes
├── IntegrityError         a packed file changed while a model was reading from it
├── BackendError           a kernel, reader or device that was asked for cannot run here
│   └── DependencyError    a library does not behave as Endor relies on
├── BudgetError            a memory budget is too small for the plan
├── PruningError           a pruning run cannot go on
├── QuantizationError      weights that cannot be quantised
└── ConfigError            an option or combination of options makes no sense

Two warnings stand beside them, for the library prints nothing: `EndorWarning` is what a caller
should know that changes no weight, and `SlowWarning`, of that kind and given once, is for what
works but at a fraction of the speed.

A message says where, the rule, what was found and the next step.
"""


class EndorError(Exception):
    """Base of all errors that Endor raises on purpose."""


class FormatError(EndorError):
    """The bytes of a packed file or tensor break the format."""


class TruncatedError(FormatError):
    """A file ends before its own header says."""


class ChecksumError(FormatError):
    """The bytes differ from their recorded checksum."""


class ShapeError(EndorError):
    """A buffer or tensor has the wrong shape or memory layout."""


class DTypeError(EndorError):
    """An element type that the operation does not take."""


class CheckpointError(EndorError):
    """A checkpoint directory is incomplete or contradicts itself."""


class OutputExistsError(CheckpointError):
    """The output is there already."""


class BusyError(CheckpointError):
    """Another process is writing the output."""


class HubError(CheckpointError):
    """A model on the Hub that cannot be had, or nothing can be put there."""


class ReadError(EndorError):
    """The operating system failed to deliver the bytes of a record."""


class IntegrityError(EndorError):
    """A packed file changed while a model was reading from it."""


class BackendError(EndorError):
    """A kernel, reader or device that was asked for cannot run here."""


class DependencyError(BackendError):
    """Another library does not behave as Endor relies on: its version is too old or too new."""


class BudgetError(EndorError):
    """A memory budget is too small for the plan."""


class PruningError(EndorError):
    """A pruning run cannot go on."""


class QuantizationError(EndorError):
    """Weights that cannot be quantised."""


class ConfigError(EndorError):
    """An option, or a combination of options, makes no sense."""


class EndorWarning(UserWarning):
    """Something that a caller should know, and that changes no weight."""


class SlowWarning(EndorWarning):
    """Something works, but far slower than it could: the message says why and what helps."""

"""Every error a user can cause, and what it means.

    MixtralError                     base: catch this to catch all of them
    ├── UnsupportedPlatformError     no MLX backend, Rosetta Python, macOS too old (also an ImportError)
    ├── MissingDependencyError       an optional package is needed; the message names the extra (also an ImportError)
    ├── ConfigError                  config.json / params.json: another architecture, a key we cannot honour, bad values
    ├── CheckpointError              the weights: missing, truncated, wrong shape or dtype, index pointing elsewhere
    │   ├── DtypeRangeError          a weight beyond the range of the chosen float type
    │   └── NonFiniteWeightsError    NaN or Inf in a tensor, named
    ├── HubError                     a hub repository cannot be reached, is gated, or does not exist
    ├── TokenizerError               no tokenizer, a broken one, or one that does not match the vocabulary
    │   └── ChatTemplateError        a chat template or a list of messages that cannot be rendered
    ├── InvalidRequestError          an argument of a wrong type or out of its range: sampling, sizes (also a ValueError)
    │   ├── ContextLengthError       prompt longer than the model's context
    │   └── ConstraintError          a schema, regex or grammar that is refused, or cannot be kept
    ├── PromptCacheError             a saved prompt that is damaged, of another version, or of another model
    ├── BusyError                    two threads use one model at once
    ├── QueueTimeoutError            a request waited for its turn for longer than it was to
    ├── ClosedError                  the model was closed
    ├── GroupError                   machines that compute together: one is missing, differs, or is lost
    ├── MemoryBudgetError            the model does not fit the memory it was given
    └── ConversionError              a conversion that cannot start or finish
        ├── DestinationError         DEST exists, is not ours, is not writable
        └── DiskSpaceError           not enough room, before or in the middle of writing

Messages say what is wrong, the value, the limit, and the fix, in one line: the CLI prints them as they are.
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "ChatTemplateError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "ConstraintError",
    "ContextLengthError",
    "ConversionError",
    "DestinationError",
    "DiskSpaceError",
    "DtypeRangeError",
    "GroupError",
    "HubError",
    "InvalidRequestError",
    "MemoryBudgetError",
    "MissingDependencyError",
    "MixtralError",
    "NonFiniteWeightsError",
    "PromptCacheError",
    "QueueTimeoutError",
    "TokenizerError",
    "UnsupportedPlatformError",
]


MAX_CHARACTERS = 500


class MixtralError(Exception):
    """Base class of every error this project raises on purpose.

    As text it is one printable line of some 500 characters at most, whatever a file had it repeat: the beginning, and the end
    with the fix.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
        return text if len(text) <= MAX_CHARACTERS else f"{text[:300]} … {text[-190:]}"


class UnsupportedPlatformError(MixtralError, ImportError):
    """MLX cannot run here: no backend installed, a Rosetta Python, or a macOS that is too old."""


class MissingDependencyError(MixtralError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class ConfigError(MixtralError):
    """The model's configuration describes something this runtime does not compute."""


class CheckpointError(MixtralError):
    """The weight files are not what their headers, index or configuration promise."""


class DtypeRangeError(CheckpointError):
    """A weight is beyond the range of the float type it is to be held in; another type has to be used."""


class NonFiniteWeightsError(CheckpointError):
    """A weight tensor holds NaN or infinity."""


class HubError(MixtralError):
    """A repository of the Hugging Face hub cannot be used."""


class TokenizerError(MixtralError):
    """The tokenizer is missing, broken, or does not match the model."""


class ChatTemplateError(TokenizerError):
    """Chat messages cannot be rendered with the checkpoint's chat format."""


class InvalidRequestError(MixtralError, ValueError):
    """An argument has a wrong type or is out of its range."""


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context."""


class ConstraintError(InvalidRequestError):
    """A schema, regular expression or grammar is refused, or cannot be kept; nothing is generated without it."""


class PromptCacheError(MixtralError):
    """A saved prompt cannot be used: damaged, of another version, or of another model."""


class BusyError(MixtralError):
    """The model is already generating on another thread."""


class QueueTimeoutError(MixtralError):
    """A request of a batch waited for its turn for longer than it was to."""


class ClosedError(MixtralError):
    """The model was closed and its weights were released."""


class GroupError(MixtralError):
    """Machines that compute one model together: one is missing, differs from the others, or is lost."""


class MemoryBudgetError(MixtralError):
    """The model does not fit the memory it was given."""


class ConversionError(MixtralError):
    """A conversion cannot start or cannot finish."""


class DestinationError(ConversionError):
    """The destination of a conversion cannot be used."""


class DiskSpaceError(ConversionError):
    """The disk has less room than the conversion needs."""

"""Every error a user can meet, as one sentence: where, what, expected, found, what to do.

Each child names one way a file, a flag or a disk can be wrong, so tests and callers can tell them
apart. The class decides the exit code of the command line: 2 usage, 3 bad input or output,
4 interrupted but resumable.

>>> print(ShapeError("wrong shape", where="model.norm.weight", expected=(576,), found=(575,),
...                  hint="the file and its config disagree"))
model.norm.weight: wrong shape (expected (576,), found (575,)); the file and its config disagree
"""

from __future__ import annotations


class QLLError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.hint = (
            what,
            where,
            expected,
            found,
            hint,
        )
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """The message in one line: `where: what (expected E, found F); hint`."""
        facts = [
            f"{word} {value}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        place = f"{self.where}: " if self.where is not None else ""
        detail = f" ({', '.join(facts)})" if facts else ""
        advice = f"; {self.hint}" if self.hint else ""
        return " ".join(f"{place}{self.what}{detail}{advice}".split())


class UsageError(QLLError):
    """A flag or an argument that cannot be what the user meant."""

    exit_code = 2


class ForeignRunError(UsageError):
    """The output folder belongs to a run with other settings."""


class InterruptedRun(QLLError):
    """The run was stopped by the user and can be resumed."""

    exit_code = 4


class CheckpointError(QLLError):
    """A checkpoint that cannot be trusted or understood."""


class MissingFileError(CheckpointError):
    """A file or folder that should be there is not."""


class TruncatedFileError(CheckpointError):
    """A file shorter (or longer) than its own header promises."""


class HeaderError(CheckpointError):
    """A file whose header lies or cannot be parsed."""


class ShapeError(CheckpointError):
    """A tensor whose shape or dtype disagrees with the config."""


class MissingTensorError(CheckpointError):
    """A tensor the architecture needs is not in the file, or one is there twice or unasked for."""


class NonFiniteError(CheckpointError):
    """NaN or infinity in a weight."""


class ConfigError(CheckpointError):
    """A model config without a value we need, or with one we do not implement."""


class UnsafeCheckpointError(CheckpointError):
    """A file that would run code, or that points outside its folder."""


class TokenizerError(CheckpointError):
    """A tokenizer that is missing, broken, or of another size than the model."""


class IntegrityError(CheckpointError):
    """A converted folder whose bytes, keys or logits differ from its manifest."""


class SourceChangedError(CheckpointError):
    """A checkpoint that is no longer the one that a run began with."""


class WorkerError(QLLError):
    """A worker that died too often, or cannot do its part where it runs."""


class SchedulerError(InterruptedRun):
    """A scheduler that does not answer, or no longer."""


class MemoryShortError(QLLError):
    """Less memory than a job needs."""


class TextError(QLLError):
    """A text too short or not readable as UTF-8."""


class LeakError(QLLError):
    """A model that predicts better than it could without seeing what it should predict."""


class OutputError(QLLError):
    """The output folder cannot be written."""


class DiskFullError(OutputError):
    """Not enough space where the output should go."""


class LockedError(OutputError):
    """Another process is writing to the same folder."""


class ReportError(QLLError):
    """A report that lacks a key, or holds a value that is not what the key promises."""


class ConvergenceError(QLLError):
    """A factorisation whose result is not finite."""

"""Every error a user can meet, as one tree.

    UnimeError
    ├── ConfigError          a setting is unknown, of the wrong type, or contradicts another
    ├── CorpusError          the corpus cannot be read, or too much of it is bad
    │   └── RejectedRow      one row is bad; ingest writes it to `rejects` and goes on
    ├── ArtifactError        a run folder lacks, or holds an unusable, artifact
    ├── ModelError           a checkpoint cannot do what is asked of it
    │   └── CanaryError      an engine's scores drifted from the stored reference
    ├── EngineDied           an inference engine is gone; its actor must be replaced
    ├── TrainingError        a loss is not finite, a checkpoint does not fit, a payload is missing
    └── EvaluationError      metrics cannot be computed from what is there

Every message is one line that names the file, row or key and says what to do about it.
"""

from __future__ import annotations


class UnimeError(Exception):
    """Base of all errors raised on purpose. The command line prints its message and exits with status 2."""


class ConfigError(UnimeError):
    """A configuration key is unknown, has the wrong type or contradicts another key."""


class CorpusError(UnimeError):
    """The corpus is missing, unreadable, or has more bad rows than `corpus.max_error_rate` allows."""


class RejectedRow(CorpusError):
    """One row cannot be used. `reason` is what `rejects.reason` records."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ArtifactError(UnimeError):
    """An artifact of a run is missing, incomplete, or does not match its declared schema."""


class ModelError(UnimeError):
    """A checkpoint, tokenizer or image processor lacks something the method needs."""


class CanaryError(ModelError):
    """An engine's canary scores differ from the reference by more than the tolerance."""


class EngineDied(UnimeError):
    """An inference engine stopped answering. Never caught by a stage: Ray replaces the actor."""


class TrainingError(UnimeError):
    """Training cannot go on: a loss is not finite, a payload is gone, or a checkpoint is another model's."""


class EvaluationError(UnimeError):
    """Metrics cannot be computed, for instance because a query has no positive in its pool."""

"""The error of this package. It carries one message for people: what, why, and what to do."""


class ExportError(Exception):
    """A model cannot be exported, or its graph failed a check; no bundle was written."""

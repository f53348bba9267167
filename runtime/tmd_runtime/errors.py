"""What can go wrong in the runtime, in three kinds. Every message says what, why, and what to do."""

from __future__ import annotations


class RuntimeFailure(Exception):
    """A run failed, or cannot begin: the bundle lacks a graph, a stage gave NaN, a file cannot be written."""


class UsageFailure(RuntimeFailure, ValueError):
    """The caller asked for what cannot be had: a step count, a size, an empty prompt, an unknown file ending."""


class Cancelled(RuntimeFailure):
    """The callback returned False. Nothing is broken: the same pipeline may run again."""

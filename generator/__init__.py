"""nearfar's generator: from a contract's name to a single header."""

from __future__ import annotations

__version__ = "0.1.0"


class UsageError(Exception):
    """A mistake of the user's, told in one line: what, its value, the rule. Ends the program with exit code 2."""

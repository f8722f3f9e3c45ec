"""Kinds of settings that the parser treats apart; they stand in the dataclasses' annotations."""

from pathlib import Path
from typing import Annotated, TypeVar

T = TypeVar("T")
POSITIONAL = "positional"
Positional = Annotated[T, POSITIONAL]
"""A setting that is given by its place on the command line, without --key=."""
Location = Annotated[str, Path]
"""Text that names a place: a file, a directory, a MODEL, storage. A leading ~ is the home directory."""

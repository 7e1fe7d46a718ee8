"""Data sets: the table of sources, `prepare`, which writes one of them to disk, and `load`, which reads that."""

from pupil.data.base import Data, Source
from pupil.data.prepare import Prepared, check, load, prepare
from pupil.data.sources import SOURCES

__all__ = ["SOURCES", "Data", "Prepared", "Source", "check", "load", "prepare"]

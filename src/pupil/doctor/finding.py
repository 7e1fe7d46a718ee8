"""What a check says."""

from typing import NamedTuple

SETUP = "rm -f .venv/ready && make setup"  # a new .venv with the locked packages


class Finding(NamedTuple):
    about: str
    said: str
    mend: str = ""  # the command that mends it; empty: nothing is wrong

    @property
    def line(self) -> str:
        words = f"{self.about}: {self.said}" + (f"; mend it: {self.mend}" if self.mend else "")
        return f"{'WRONG' if self.mend else 'ok   '} {' '.join(words.split())}"

"""Names that DVC writes into commands and paths as they are: a shell and a folder must find nothing but a name.  No torch."""

import re

PLAIN = re.compile(r"[\w./:+-]+", re.ASCII)
WANTED = "is no plain name; letters, digits and . / : + - _ are possible"


def plain(name: str) -> bool:
    return bool(PLAIN.fullmatch(name)) and not name.startswith("-") and ".." not in name.split("/")

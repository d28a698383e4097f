"""Commands of shell blocks: taking them apart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

HEREDOC = re.compile(r"<<'?(\w+)'?")


def commands_of(text: str) -> Iterator[str]:
    """The commands of a block: lines, with those that continue them and with here-documents."""
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while _is_open(command):
            command += "\n" + next(lines)
        if found := HEREDOC.search(command):
            for following in lines:
                command += "\n" + following
                if following == found[1]:
                    break
        if command.strip() and not command.startswith("#"):
            yield command


def _is_open(command: str) -> bool:
    """Whether the next line belongs to it."""
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command.partition("<<")[0], comments=True)
    except ValueError:  # a quotation that goes on
        return True
    return False


def words_of(command: str) -> list[str]:
    """The words of a simple command, without a comment."""
    return shlex.split(command, comments=True)

"""How the words of a command line may be spelled, and what tyro gets to see of them.

--calib-text is --calib_text, a verb may know other names for its flags, `--streaming True` and
`--streaming=False` are switches, and flags that mean nothing here are left out and named.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

SWITCHED = {"True": "--", "False": "--no_"}


def spell(
    words: Sequence[str],
    config: type,
    aliases: Mapping[str, str],
    without_effect: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """The words as tyro takes them for the dataclass `config`, and the flags that were left out.

    aliases: other spellings of flags. without_effect: flags with a value, and why they do nothing.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     streaming: bool = False
    >>> words = ["--streaming", "False", "--old-name=3", "--mode", "x", "--streaming=True"]
    >>> spell(words, Config, {"--old_name": "--new_name"}, {"--mode": "the verb says it"})
    (['--no_streaming', '--new_name=3', '--streaming'], {'--mode': 'the verb says it'})
    """
    known, found, left_out = switches(config), [], {}
    named = iter([_named(word, aliases) for word in words])
    for word in named:
        flag, _, value = word.partition("=")
        before = found[-1].removeprefix("--") if found else ""
        if flag in without_effect:
            left_out[flag] = without_effect[flag]
            if flag == word:
                next(named, None)
        elif word in SWITCHED and before in known:
            found[-1] = SWITCHED[word] + before
        elif value in SWITCHED and flag.removeprefix("--") in known:
            found.append(SWITCHED[value] + flag.removeprefix("--"))
        else:
            found.append(word)
    return found, left_out


def switches(config: type) -> set[str]:
    """Names of the settings of a dataclass, and of those inside it, that are on or off."""
    found: set[str] = set()
    for name, kind in typing.get_type_hints(config).items():
        if kind is bool:
            found.add(name)
        elif dataclasses.is_dataclass(kind):
            found |= switches(kind)
    return found


def flag_of(word: str) -> str:
    """The flag in --flag=value."""
    return word.partition("=")[0]


def _named(word: str, aliases: Mapping[str, str]) -> str:
    """The word with its flag by its name here; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = "--" + flag[2:].replace("-", "_")
    return aliases.get(flag, flag) + equals + value

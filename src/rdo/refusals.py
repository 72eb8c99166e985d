"""What to say of a command line that hydra refuses: one line with the setting, what is allowed and what was meant."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from hydra.errors import OverrideParseException

from rdo.errors import UserError
from rdo.schema import Config

# How alike two names must be for one to be taken as a misspelling of the other.
ALIKE = 0.7
MOST_SUGGESTIONS = 3
# What hydra takes in a value without quotes.
PLAIN = r"[A-Za-z0-9_/\\\-+.$%*@?|: ]"
# OmegaConf's words for a value of the wrong type, and ours.
TYPES = (
    (r"Value '.*' of type '\w+' could not be converted to Integer", "must be a whole number"),
    (r"Value '.*' of type '\w+' could not be converted to Float", "must be a number"),
    (r"Value '.*' is not a valid bool[^;]*", "must be true or false"),
    (r"field '.*' is not Optional", "cannot be null"),
    (r"Invalid value assigned: \w+ is not a ListConfig, list or tuple", "must be a list, such as [a,b]"),
)


def one_line(error: BaseException) -> str:
    """Hydra and OmegaConf spread an error over several lines and causes; this keeps what a user needs of it."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in str(cause).splitlines():
            text = line.strip().rstrip(".")
            if text.startswith("Config search path"):
                break
            skipped = text.startswith(("To append", "object_type", "reference_type", "Set the env", "^", "See https"))
            if text and not skipped and text not in lines:
                lines.append(text)
        cause = cause.__cause__
    text = "; ".join(lines)
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, lines[-1] if lines else "")
    if found := re.search(r"Could not find '([\w/]+)/([^'/]*)'; Available options in '[\w/]+':; (.*)", text):
        group, name, allowed = found.groups()
        return hinted(f"{group}={name}: must be one of {allowed.replace('; ', ', ')}")
    if (found := re.search(r"Key '.*' (?:is )?not in .*; full_key: ([\w.]+)", text)) and found[1][:6] != "hydra.":
        return unknown_setting(found[1])
    for theirs, ours in TYPES:
        text = re.sub(theirs, ours, text)
    if found := re.fullmatch(r"Error merging override (.*?); (.*); full_key: [\w.]+", text):
        return f"{found[1]}: {found[2]}"
    if found := re.fullmatch(r"(.*); full_key: ([\w.]+)", text):
        return f"{found[2]}: {found[1]}"
    return text or type(error).__name__


def unreadable(override: str, reason: str) -> str:
    """What to say of an override that is none by hydra's grammar."""
    if reason.startswith("missing EQUAL") or not override:
        return f"{override or 'an empty argument'}: a setting is KEY=VALUE, a group GROUP=NAME"
    key, _, value = override.partition("=")
    special = sorted(set(re.sub(PLAIN, "", value)))
    if not value or not special:
        reason = reason.replace(override, "").strip(" :")
        return f"{override}: cannot be read ({reason}); such a value needs two kinds of quotes, 'KEY=\"VALUE\"'"
    quoted = value.replace('"', '\\"')
    suggestion = shlex.quote(f'{key}="{quoted}"')
    meant = {"[": "; if it is meant as a list, that is [a,b]", "{": "; if it is meant as a mapping, that is {a: b}"}
    return (
        f"{override}: cannot be read: the value holds {' '.join(special)} and needs two kinds of quotes, {suggestion}"
        f"{meant.get(value[0], '')}"
    )


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that suggests the nearest of the known names; nothing where none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=ALIKE)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def hinted(message: str) -> str:
    """A message that lists what is allowed, with the nearest of it as a suggestion."""
    if found := re.fullmatch(r"[\w./]+=(\S+): must be one of (.+)", message):
        return message + did_you_mean(found[1], found[2].split(", "))
    if found := re.fullmatch(r"(\w+\.)(\w+): .*; it has (.+)", message):
        return message + did_you_mean(found[2], found[3].split(", "), found[1])
    return message


def unknown_setting(key: str) -> str:
    """What to say of a key that the schema has not: where it goes wrong, what there is, and what was meant."""
    section: Any = Config()
    where = ""
    for part in key.split("."):
        known = [field.name for field in fields(section)] if is_dataclass(section) else []
        if isinstance(section, dict):
            return f"{key}: there is no such setting yet; add it with +{key}=VALUE"
        if part not in known:
            has = f"{where or 'the config'} has {', '.join(known)}" if known else f"{where} is a single value"
            hint = did_you_mean(part, known, where and f"{where}.") or elsewhere(key.split(".")[-1])
            return f"{key}: there is no such setting; {has}{hint}"
        section, where = getattr(section, part), f"{where}.{part}".lstrip(".")
    return f"{key}: there is no such setting"


def elsewhere(name: str) -> str:
    """A suggestion for a setting whose section was left out or confused: where there is one of this name."""
    known = setting_names(Config())
    named = [key for key in known if key.split(".")[-1] == name]
    if not named:
        near = get_close_matches(name, {key.split(".")[-1] for key in known}, n=1, cutoff=ALIKE)
        named = [key for key in known if near and key.split(".")[-1] == near[0]]
    return f" (did you mean {' or '.join(named)}?)" if 0 < len(named) <= MOST_SUGGESTIONS else ""


def setting_names(section: Any, prefix: str = "") -> list[str]:
    """The dotted names of every setting of a section of the config."""
    found: list[str] = []
    for field in fields(section):
        value = getattr(section, field.name)
        own = f"{prefix}{field.name}"
        found += setting_names(value, f"{own}.") if is_dataclass(value) else [own]
    return found


def check_keys(section: Any, prefix: str = "") -> None:
    """Refuses keys that `+KEY=VALUE` added to a typed section: nothing would read them."""
    known = {field.name for field in fields(section)}
    for name, value in vars(section).items():
        if name not in known:
            raise UserError(unknown_setting(f"{prefix}{name}"))
        if is_dataclass(value):
            check_keys(value, f"{prefix}{name}.")

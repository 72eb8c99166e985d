"""What of a text may be shown: control characters and invisible ones as escapes, credentials not at all."""

from __future__ import annotations

import os
import re
import unicodedata

# Control, format (bidirectional overrides, zero-width characters, tags), surrogates, line and paragraph separators.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
REMOVED = "[removed]"

# Environment variables whose values are credentials, whatever these look like.
TELLTALE_NAME = re.compile(r"(?i)(token|api_?key|access_?key|secret(_?key)?|password|passwd)$")
SHORTEST_VALUE = 12

START, END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
# What a credential looks like, and the variable that it belongs into (None: rdo has no use for it).
CREDENTIALS: tuple[tuple[re.Pattern[str], str | None], ...] = tuple(
    (re.compile(pattern), variable)
    for pattern, variable in (
        (rf"{START}(?:hf|api_org)_[A-Za-z0-9]{{16,}}", "HF_TOKEN"),
        # 40 hexadecimal digits are a git commit, too: as a part of a path, or where the text says so.
        (r"(?<![\w/@-])(?<!revision[ =:])(?<!commit[ =:])[0-9a-f]{40}(?!\w)", "WANDB_API_KEY"),
        (rf"{START}wandb_v\d_\w{{16,}}", "WANDB_API_KEY"),
        (rf"{START}sk-(?:(?=[\w-]*\d)[\w-]{{16,}}|[A-Za-z0-9]{{20,}})", None),
        (rf"{START}A[KS]IA[0-9A-Z]{{16}}{END}", None),
        (rf"{START}(?:gh[a-z]_[A-Za-z0-9]{{16,}}|github_pat_\w{{16,}}|glpat-[\w-]{{16,}}|xox[a-z]-[\w-]{{10,}})", None),
        (rf"{START}AIza[\w-]{{35}}{END}|{START}eyJ[\w-]{{8,}}\.eyJ[\w-]{{8,}}\.[\w-]*", None),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?", None),
        (r"(?i)\bbearer (?=\S*\d)[\w.~+/=-]{16,}", None),
        # In addresses: before the host, and signatures and keys among the parameters.
        (r"(?<=://)(?!\[removed\])[^\s/@'\"]+(?=@)", None),
        (r"(?i)(?<=[?&])[\w-]*(?:token|signature|secret|password|api_?key|credential)[\w-]*=[^&\s'\"]+", None),
    )
)  # fmt: skip


def printable(text: object, keep: str = "\n\t") -> str:
    r"""The text with every character that a terminal would act upon, or that cannot be seen, as an escape (\x1b,
    \u202e); `keep` are the control characters that stay."""
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(c if c in keep or unicodedata.category(c) not in HIDDEN else escape(c) for c in whole)


def escape(character: str) -> str:
    """A character as Python would write it in a string, whatever it is."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def single_line(text: object) -> str:
    """The text on one line, printable and without credentials: what an error message is shown as."""
    lines = (line.strip() for line in re.split(r"[\r\n]+", scrubbed(str(text))))
    return printable(" ".join(line for line in lines if line), keep="")


def scrubbed(text: str) -> str:
    """The text without anything that looks like a credential, or is the value of a variable named like one."""
    for value in secret_values():
        text = text.replace(value, REMOVED)
    for pattern, _ in CREDENTIALS:
        text = pattern.sub(REMOVED, text)
    return text


def secret_values() -> list[str]:
    """Values of the environment's variables that are named like credentials; the longest first."""
    found = {value for name, value in os.environ.items() if TELLTALE_NAME.search(name) and len(value) >= SHORTEST_VALUE}
    return sorted(found, key=len, reverse=True)


def credential_in(text: str, commit: bool = False) -> str | None:
    """What to do about a credential in a text, as the end of a message that does not repeat it; None: there is none.

    `commit`: 40 hexadecimal digits are a commit here, and no key.
    """
    if commit and re.fullmatch(r"[0-9a-f]{40}", text):
        return None
    if any(value in text for value in secret_values()):
        return "holds the value of a secret environment variable: leave it there"
    for pattern, variable in CREDENTIALS:
        if pattern.search(text):
            where = f"put it into the environment ({variable})" if variable else "take it out"
            return f"holds what looks like an access token or a password: {where}"
    return None

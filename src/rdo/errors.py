"""The one error a user is meant to read: its message says what is wrong, where, and what to do about it."""


class UserError(Exception):
    """Something the user can mend: a setting, a file, a row. `train.py` prints the message alone and exits with 1."""


class DataError(UserError):
    """A row or file of input data cannot be used; the message names the file, the line and the field."""

"""The two kinds of failure a command may end with on purpose."""


class UserError(ValueError):
    """Something the user can mend: a configuration value, a missing file, a world size. Exit code 2, no traceback."""

    told = False
    """Whether another process of the same run tells the user."""


class Fault(RuntimeError):
    """Something the machine did: a full disk, a broken checkpoint. Exit code 1, one message, no traceback."""

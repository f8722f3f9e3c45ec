"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input or a wrong setting: says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

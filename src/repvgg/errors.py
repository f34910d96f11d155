"""The one exception that means: what you gave is wrong, the program is not."""


class InputError(ValueError):
    """A file, folder, field or argument that cannot be used.

    The message is one line that names it, says what was found and what is needed. The command
    line prints it and exits with code 2; anything else that escapes is a fault of this package.
    """

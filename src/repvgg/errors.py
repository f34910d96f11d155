"""Exceptions that are no fault of this package: wrong input, and a signal to stop."""


class InputError(ValueError):
    """A file, folder, field or argument that cannot be used.

    The message is one line that names it, says what was found and what is needed. The command
    line prints it and exits with code 2; anything else that escapes is a fault of this package.
    """


class Interrupted(Exception):
    """A signal asked a long work to stop, and what it had done is kept.

    Attributes:
        exit_code: of the process: 128 and the number of the signal.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number

"""The project's exception types; the command line turns each into a single line and exit status 2."""


class InputError(ValueError):
    """Bad input from outside: a file, a field, an option, a picture.

    The message is one line that names what was found, where, and what was expected.
    """


class NumericError(ArithmeticError):
    """The model gave numbers that nothing can be chosen from, such as NaN: weights or precision are wrong.

    The message is one line that names the row, the position and what was found.
    """


class GenerationError(RuntimeError):
    """An answer could not be brought to its end, such as one whose grammar failed on the way.

    The message is one line that names what stopped it.
    """

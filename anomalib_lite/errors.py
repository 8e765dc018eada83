"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """One line that names the file, field or option and says what to do; the programs print it and exit with 2."""

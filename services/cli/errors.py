"""The one way in which a command gives up."""


class CommandError(Exception):
    """The command cannot go on. The message is a sentence for people; `main` prints it and exits with 1."""

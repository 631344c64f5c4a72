"""The one way in which a command gives up."""

from typing import Final

_START: Final = "Start Sessiongate with `sessiongate up`, or check SESSIONGATE_DATABASE_URL."
_CHECK: Final = "Check SESSIONGATE_DATABASE_URL."
_AGAIN: Final = "Try again in a moment."

# 28 authorisation, 3D no such database, 42501 a right is missing.
_NOT_LET_IN: Final = ("28", "3D", "42501")
# A table, a column, a function or a schema that is not there.
_NOT_MIGRATED: Final = ("42P01", "42703", "42883", "3F000")


class CommandError(Exception):
    """The command cannot go on. The message is a sentence for people; `main` prints it and exits with 1."""


def explain(error: BaseException) -> str | None:
    """What is wrong with the database or a file, and what to do about it; None for any other fault."""
    # Here: whoever asks for help need not wait for these imports, and after a fault nobody does.
    import asyncpg
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    from libs.domain.db import driver_error, is_transient

    if isinstance(error, PoolTimeout):
        return f"The database is busy: no connection became free. {_AGAIN}"
    if isinstance(error, SQLAlchemyError):
        cause = driver_error(error)
        return f"The database cannot be used: {error}" if cause is error else explain(cause)
    if isinstance(error, asyncpg.PostgresError):
        state: str = error.sqlstate or ""
        if state.startswith(_NOT_LET_IN):
            return f"The database does not let us in: {error.args[0]}. {_CHECK}"
        if state in _NOT_MIGRATED:
            return "The database lacks the present schema. Bring it up to date with `sessiongate migrate`."
        if is_transient(error):
            return f"The database is busy or stopping: {error.args[0]}. {_AGAIN}"
        return f"The database reports a fault ({state}): {error.args[0]}. Its log tells more."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError):
        why = getattr(error, "strerror", None) or str(error) or "it does not answer in time"
        return f"The database cannot be reached: {why}. {_START}"
    return None

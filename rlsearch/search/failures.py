"""A full disk, a lost cluster and the like as the search's own failure: what is lost, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from optuna.exceptions import OptunaError
from ray.exceptions import RayError
from ray.tune import TuneError
from sqlalchemy.exc import SQLAlchemyError

from rlsearch.errors import SearchError
from rlsearch.files import is_storage_failure
from rlsearch.search.database import DatabaseAwayError
from rlsearch.search.run_folder import RunFolder


def explained(cause: Exception, folder: RunFolder, option: str = "") -> Exception:
    """What is told of an error that has ended a search; the error itself where it is told as it stands.

    Args:
        cause: the error.
        folder: of the run.
        option: what a resume needs beside the folder.
    """
    go_on = f"nothing that ended is lost: mend it, then go on by `rlsearch resume {folder.path}{option}`"
    if not folder.holds_search():
        go_on = "nothing was trained yet: mend it, then start again"
    if isinstance(cause, OSError):
        return SearchError(f"{cause.filename or folder.path}: cannot be written ({cause.strerror or cause}); {go_on}")
    if isinstance(cause, DatabaseAwayError):
        return SearchError(f"the study's database does not answer ({cause}), and was asked for a minute; {go_on}")
    if isinstance(cause, OptunaError | SQLAlchemyError):
        return SearchError(f"{folder.study_path}: cannot be written ({_first_cause(cause)}); {go_on}")
    if isinstance(cause, TuneError | RayError):
        return SearchError(f"Ray has failed ({cause}); {go_on}")
    return cause


@contextlib.contextmanager
def storage_explained(folder: RunFolder) -> Iterator[None]:
    """Explains what comes of a disk that cannot be written to while the block runs.

    Raises:
        SearchError: it cannot.
    """
    try:
        yield
    except (OSError, OptunaError, SQLAlchemyError, DatabaseAwayError) as error:
        if isinstance(error, OSError) and not is_storage_failure(error):
            raise
        raise explained(error, folder) from error


def _first_cause(error: BaseException) -> str:
    """What the database itself said, on one line: Optuna's own words only guess."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())

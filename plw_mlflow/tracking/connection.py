"""Connection: whether the tracking store answers, waiting for it while it does not, and what its errors mean."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException
from mlflow.utils import logging_utils

from plw_mlflow.errors import Refused, Unreachable, UserError, reason, without_passwords

WAIT_SECONDS = 600.0  # for a store that went away, where the work cannot go on without it
ASK_SECONDS = 2.0  # between two attempts to reach it again
CONNECT_SECONDS = 5.0  # in which a server takes a connection, if it runs at all
ANSWER_SECONDS = 20.0  # in which a server or a database answers, however busy it is

# MLflow gives a database's other errors as BAD_REQUEST and INTERNAL_ERROR. They may be over in a moment.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"})
_NO_PERMISSION = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
_REFUSING_STATUS = (401, 403, 413)  # of a server of artifacts. 404 may come from a proxy while the server restarts.

_POSTGRESQL_LOCK = 0x706C77  # any number that nobody else uses: "plw"
_ANSWERED: set[str] = set()  # addresses of stores that have answered this process

Result = TypeVar("Result")


def address() -> str:
    """Where the tracking store is, without the password that may be part of its address."""
    return without_passwords(mlflow.get_tracking_uri())


def check_reachable() -> None:
    """Ask the tracking store for something small, without the retries that MLflow would make.

    Raises Unreachable where it does not answer, and UserError where waiting would not help, because the address is
    wrong or the store refuses to be used. For the main thread only, since it changes the environment for a moment.
    """
    _quiet_mlflow()
    uri = mlflow.get_tracking_uri()
    cannot = f"the tracking store {address()} cannot be used"
    try:
        with hurried(), _first_request_lock(uri):
            _check_address(uri)
            with _first_request_to_postgresql(uri):
                mlflow.MlflowClient().search_experiments(max_results=1)
    except UnsupportedModelRegistryStoreURIException as error:
        schemes = ", ".join(scheme for scheme in error.supported_uri_schemes if scheme)
        raise UserError(f"{cannot}: MLflow knows no such kind of address; it knows {schemes}") from None
    except ImportError as error:
        raise UserError(f"{cannot}: the driver of that database is not installed ({reason(error)})") from None
    except Exception as error:
        if _is_mistake(error):
            raise UserError(f"{cannot}: {reason(error)}{_advice(error)}") from None
        raise Unreachable(f"{cannot}: {reason(error)}") from None


@contextmanager
def hurried(seconds: float = ANSWER_SECONDS, retries: int = 1) -> Iterator[None]:
    """Within the block, MLflow sends a request twice at most, and waits so many seconds for each answer.

    retries: how often it sends a request again that has failed.
    """
    changed = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(seconds))),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _first_request_lock(uri: str) -> Iterator[None]:
    """Within the block, no other process of this package makes its first request to the same SQLite store.

    MLflow makes the tables of a fresh store at the first request, in 60 migrations. If two processes do so at once, one
    of them fails. The lock is a file beside the store, and is not taken again once the store has answered.
    """
    path = sqlite_file(uri)
    if path is None or uri in _ANSWERED:
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):  # where no file can be written, no store can be made
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, lock)
            _await_lock(lock)
        yield
        _ANSWERED.add(uri)


@contextmanager
def _first_request_to_postgresql(uri: str) -> Iterator[None]:
    """The same for PostgreSQL, where the lock is the database's own, and keeps out processes of other machines too."""
    if uri.partition(":")[0].partition("+")[0] not in ("postgresql", "postgres") or uri in _ANSWERED:
        yield
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # the lock ends with it
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_POSTGRESQL_LOCK})").scalar():
                break
            time.sleep(0.1)
        yield
        _ANSWERED.add(uri)


def _await_lock(lock: int) -> None:
    """Return with the lock, or without it after WAIT_SECONDS, since a process that was stopped may hold it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores, and for one in memory."""
    if uri.partition(":")[0].partition("+")[0] != "sqlite":
        return None
    import sqlalchemy

    try:
        database = sqlalchemy.make_url(uri).database
    except (sqlalchemy.exc.ArgumentError, ValueError):  # `_check_address` says so
        return None
    return Path(database) if database and not database.startswith(("file:", ":memory:")) else None


def _check_address(uri: str) -> None:
    """Raise an error where no server or database answers at an address.

    MLflow itself would try a database ten times within two minutes, and print every failure.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in ("http", "https"):
        try:
            _ = urlsplit(uri).port
        except ValueError:  # whose message quotes what may be a part of a password
            raise UserError(
                "it is not a valid address; characters like / and # of a password are written as %2F"
            ) from None
        with suppress(requests.exceptions.SSLError):  # MLflow may have been given other certificates
            requests.head(uri, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), allow_redirects=False)
    elif scheme in DATABASE_ENGINES:
        import sqlalchemy

        try:
            url = sqlalchemy.make_url(uri)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise UserError(
                "it is not a valid address; characters like / and @ of a password are written as %2F"
            ) from None
        is_sqlite = scheme == "sqlite"
        if (path := sqlite_file(uri)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
        try:
            engine = sqlalchemy.create_engine(
                url, poolclass=sqlalchemy.NullPool, connect_args={"timeout": ANSWER_SECONDS} if is_sqlite else {}
            )
        except sqlalchemy.exc.NoSuchModuleError as error:
            raise ImportError(str(error)) from None
        with engine.connect() as connection:
            if is_sqlite:  # it opens any file, and only a statement shows whether that can be read and written
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                connection.exec_driver_sql("CREATE TABLE plw_mlflow_asks (whether)")
                connection.exec_driver_sql("ROLLBACK")


def _is_mistake(error: Exception) -> bool:
    """Whether the store's address is wrong or cannot be used, so that waiting for the store would not help."""
    if is_refusal(error) or isinstance(error, ValueError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, (ConnectionError, TimeoutError, requests.RequestException))
    text = str(error)
    return "filesystem tracking backend" in text or ("sqlite3." in text and "locked" not in text)


def is_refusal(error: BaseException) -> bool:
    """Whether the store has answered, and would give the same answer to every further attempt."""
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS | _NO_PERMISSION
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in _REFUSING_STATUS
    return isinstance(error, Refused)


def explained(doing: str, error: MlflowException | OSError) -> Refused | Unreachable:
    """An error of the store as one whose message says in a line what was being done, what is wrong, and what to do."""
    if is_refusal(error):
        return Refused(f"{doing}: the tracking store {address()} refuses it: {reason(error)}{_advice(error)}")
    return Unreachable(f"{doing}: the tracking store {address()} fails: {reason(error)}")


def _advice(error: BaseException) -> str:
    """What to do about a refusal, as the end of a sentence; empty where that is unknown."""
    response = getattr(error, "response", None)
    if getattr(error, "error_code", None) in _NO_PERMISSION or getattr(response, "status_code", None) in (401, 403):
        return "; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, say who asks"
    if match := re.search(r"experiment (\S+) must be in the 'active' state", str(error)):
        return (
            f"; restore it by mlflow experiments restore --experiment-id {match[1]}, or name another experiment in "
            "MLFLOW_EXPERIMENT_NAME"
        )
    if match := re.search(r"run (\S+) must be in the 'active' state", str(error)):
        return (
            f"; restore it by {_restore_command(match[1])}, or give the same command again, which begins a new run and "
            "goes on from the last checkpoint, if there is one"
        )
    return ""


def _restore_command(run_id: str) -> str:
    return f"mlflow runs restore --run-id {run_id}"


def patiently(doing: str, call: Callable[[], Result]) -> Result:
    """What `call` returns. If the store goes away meanwhile, `call` is made again as soon as the store is back.

    doing: what is being done, for messages.

    `call` may have done all or a part of its work before the connection broke, so doing it twice must have the same
    effect as doing it once.

    Raises Refused at once where the store refuses (because the run was deleted, say), and Unreachable where the store
    stays away for WAIT_SECONDS. Other errors of `call` are raised if a second call fails while the store answers; the
    first may have failed because the store was away for a moment.
    """
    is_second = False
    while True:
        try:
            return call()
        except (MlflowException, OSError) as error:  # what requests raises is an OSError
            if is_refusal(error):
                raise explained(doing, error) from error
            was_away = _await_store(doing, error)
            if is_second and not was_away:
                raise
            is_second = not was_away


@contextmanager
def suppressing_missing() -> Iterator[None]:
    """Within the block, that something is not in the store, or no longer, ends the block and is no error."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def await_reachable(doing: str) -> None:
    """Like `check_reachable`, but a store that is away is waited for, as `patiently` does it."""
    try:
        check_reachable()
    except Unreachable as error:
        _await_store(doing, error)


def _await_store(doing: str, error: Exception) -> bool:
    """Return once the store answers. Returns whether it had to be waited for."""
    deadline = time.monotonic() + WAIT_SECONDS
    has_waited = False
    while True:
        try:
            check_reachable()
            return has_waited
        except ConnectionError:
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"{doing}: the tracking store {address()} was away for {WAIT_SECONDS:.0f} s "
                    f"({reason(error)}); give the same command again when it is back"
                ) from error
            if not has_waited:
                print(f"{doing}: the tracking store is away; waiting for it, at most {WAIT_SECONDS:.0f} s", flush=True)
            has_waited = True
            time.sleep(ASK_SECONDS)


def get_run(run_id: str, *, even_deleted: bool = False) -> mlflow.entities.Run:
    """The run of that id. Raises UserError where it does not exist, or was deleted and `even_deleted` is not set."""
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code not in _REFUSALS:  # INVALID_PARAMETER_VALUE: no run's id is spelt like this
            raise
        raise UserError(f"there is no run {run_id!r} in {address()}") from None
    if run.info.lifecycle_stage != "active" and not even_deleted:
        raise UserError(f"run {run_id} in {address()} was deleted; restore it by {_restore_command(run_id)}")
    return run


@contextmanager
def without_notes() -> Iterator[None]:
    """Within the block, MLflow prints no notes, such as those on what it has registered."""
    logging_utils.disable_logging()
    try:
        yield
    finally:
        logging_utils.enable_logging()


def _quiet_mlflow() -> None:
    """Silence MLflow's notes on migrations and missing model cards, which a user can do nothing about.

    Its database layer logs errors with a traceback that it raises as well; they are shown once, where they are caught.
    MLflow's own note on where to see a run would show a password in the store's address.
    """
    for logger, level in (
        ("alembic", logging.WARNING),
        ("mlflow", logging.WARNING),
        ("mlflow.transformers", logging.ERROR),
        ("mlflow.store.db.utils", logging.CRITICAL),
    ):
        logging.getLogger(logger).setLevel(level)
    if address() != mlflow.get_tracking_uri():
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

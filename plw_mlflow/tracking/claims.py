"""Claims: who is at work on something that must not be done twice, such as a cell of a sweep.

MLflow has no way to change a value only if it is still the old one, but no two registered models can have one name. So
a claim is a registered model without versions, named plw-claim-NAME-NUMBER, that is removed when the work has ended.

A process that dies leaves its claim behind. On the machine of that process this is known at once. From elsewhere, it
shows in the claim's tag plw.alive, which a living holder changes every few seconds: a claim that nobody has changed for
SILENT_SECONDS is taken for abandoned. That is long enough for a machine that is busy or short of memory. Clocks of
different machines are never compared.

An abandoned claim is not removed but outbid: whoever wants it creates the name with the next number, which again only
one can do. The claim with the highest number counts. Someone who has looked long ago may come too late for that: so
whoever has created a name looks once more, and gives way where a higher number is there, or where the claim that it
has outbid is no longer the abandoned one.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlflow
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from plw_mlflow.environment import processes
from plw_mlflow.tracking.connection import patiently

SIGN_SECONDS = 15.0  # between two signs of life of a holder
SILENT_SECONDS = 180.0  # after which a claim without a sign of life is taken for abandoned
PREFIX = "plw-claim"
DESCRIPTION = "A process is at work on this; the name is removed when it ends (plw_mlflow/tracking/claims.py)."


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds."""

    name: str
    number: int


@dataclass
class Claims:
    """The claims of one process: those that it holds, and what it has seen of others'."""

    _held: dict[str, Claim] = field(default_factory=dict)  # by name
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)  # others' last sign, and when it was first seen

    def take(self, name: str) -> bool:
        """Take the claim of a name, unless another process holds it. Returns whether this process holds it now."""
        standing = self._standing(name)
        if standing is None:
            return self._create(name, 1, None)
        number = _number(standing)
        return self._is_abandoned(standing) and self._create(name, number + 1, standing)

    def of_others(self, beginning: str) -> set[str]:
        """The names with a beginning whose claims other processes hold."""
        standing: dict[str, RegisteredModel] = {}
        for claim in patiently("looking at claims", lambda: _search(beginning)):
            name = claim.name.removeprefix(f"{PREFIX}-").rpartition("-")[0]
            if name not in standing or _number(standing[name]) < _number(claim):
                standing[name] = claim
        return {name for name, claim in standing.items() if name not in self._held and not self._is_abandoned(claim)}

    def release(self, name: str) -> None:
        """Give a claim back, when the work has ended and its outcome can be seen by all."""
        claim = self._held.pop(name)
        with suppress(MlflowException, OSError):  # another process outbids what is left behind
            for number in range(1, claim.number + 1):
                _remove(name, number)

    @contextmanager
    def giving_signs_of_life(self) -> Iterator[None]:
        """Within the block, a thread changes the tag plw.alive of all held claims every few seconds.

        Afterwards, those that are still held are released.
        """
        ended = threading.Event()

        def give_signs() -> None:
            client = mlflow.MlflowClient()
            while not ended.wait(SIGN_SECONDS):
                for claim in list(self._held.values()):
                    with suppress(Exception):  # a store that is away for a while does not end this thread
                        client.set_registered_model_tag(_full_name(claim.name, claim.number), "plw.alive", _sign())

        thread = threading.Thread(target=give_signs, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(SIGN_SECONDS)
            for name in list(self._held):
                self.release(name)

    def _standing(self, name: str) -> RegisteredModel | None:
        """The claim of a name that counts, if there is one."""
        claims = patiently("looking at claims", lambda: _search(f"{name}-"))
        return max(claims, key=_number, default=None)

    def _is_abandoned(self, claim: RegisteredModel) -> bool:
        ended = processes.has_ended(claim.tags.get("plw.process", ""))
        if ended is not None:
            return ended
        sign = claim.tags.get("plw.alive", "") + claim.tags.get("plw.holder", "")
        seen, since = self._seen.get(claim.name, (None, 0.0))
        if sign != seen:
            self._seen[claim.name] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > SILENT_SECONDS

    def _create(self, name: str, number: int, outbid: RegisteredModel | None) -> bool:
        holder = uuid.uuid4().hex
        tags = {"plw.holder": holder, "plw.process": processes.identity(), "plw.alive": _sign()}
        client, full = mlflow.MlflowClient(), _full_name(name, number)

        def create() -> bool:
            try:
                client.create_registered_model(full, tags, DESCRIPTION)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                return _holder(full) == holder  # the answer to an earlier attempt may have been lost
            return True

        if not patiently("claiming work", create):
            return False
        claims = {_number(claim): claim for claim in patiently("looking at claims", lambda: _search(f"{name}-"))}
        is_late = max(claims, default=0) > number or (
            outbid is not None
            and claims.get(number - 1) is not None
            and claims[number - 1].tags.get("plw.holder") != outbid.tags.get("plw.holder")
        )
        self._held[name] = Claim(name, number)
        if is_late:
            del self._held[name]
            with suppress(MlflowException, OSError):
                _remove(name, number)
        return not is_late


def _full_name(name: str, number: int) -> str:
    return f"{PREFIX}-{name}-{number}"


def _number(claim: RegisteredModel) -> int:
    return int(claim.name.rpartition("-")[2])


def _search(beginning: str) -> list[RegisteredModel]:
    """All claims whose names begin so."""
    return list(mlflow.MlflowClient().search_registered_models(f"name LIKE '{PREFIX}-{beginning}%'", max_results=1000))


def _holder(full_name: str) -> str | None:
    with suppress(MlflowException):  # it has been removed meanwhile
        return str(mlflow.MlflowClient().get_registered_model(full_name).tags.get("plw.holder"))
    return None


def _remove(name: str, number: int) -> None:
    """Remove a claim, if it is there."""
    try:
        mlflow.MlflowClient().delete_registered_model(_full_name(name, number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _sign() -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {uuid.uuid4().hex[:4]}"

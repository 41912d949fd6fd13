"""Claims: who is at work on something that must not be done twice, such as a cell of a sweep.

MLflow has no way to change a value only if it is still the old one, but no two registered models can have one name. So
a claim is a registered model without versions, named plw-claim-NAME-NUMBER, that is removed when the work has ended.

A process that dies leaves its claim behind. On the machine of that process this is known at once. From elsewhere, it
shows in the claim's tag plw.alive, which a living holder changes every few seconds: a claim that nobody has changed for
SILENT_SECONDS is taken for abandoned. That is long enough for a machine that is busy or short of memory. Clocks of
different machines are never compared.

An abandoned claim is not removed but outbid: whoever wants it creates the name with the next number, which again only
one can do. Someone who has looked long ago may come too late for that: so whoever has created a name looks once more,
and gives way where there is any other claim but the abandoned ones that it has seen. Of two that are at it together,
the one that creates its name later sees the other's, so that both may give way, but never both go on.

A holder removes a claim only where it is still its own, and sends that request once, since one that is sent again
after its answer was lost might remove the claim that somebody else has made meanwhile.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlflow
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from plw_mlflow.environment import processes
from plw_mlflow.errors import Refused
from plw_mlflow.tracking import signs
from plw_mlflow.tracking.connection import hurried, patiently, suppressing_missing
from plw_mlflow.tracking.signs import SIGN_SECONDS

SILENT_SECONDS = 180.0  # after which a claim without a sign of life is taken for abandoned
UNSEEN_SECONDS = 60.0  # after which silence is counted anew: while nobody looked, the store may have been away for all
PREFIX = "plw-claim"
NUMBERED = re.compile(r"-[0-9]{1,9}$")
DESCRIPTION = "A process is at work on this; the name is removed when it ends (plw_mlflow/tracking/claims.py)."


@dataclass(frozen=True)
class Claim:
    """A claim that this process holds."""

    name: str
    number: int
    holder: str  # who holds it: unique to this claim
    outbid: frozenset[str]  # holders of the abandoned claims with lower numbers

    @property
    def full_name(self) -> str:
        """The name of the registered model."""
        return _full_name(self.name, self.number)


@dataclass
class Claims:
    """The claims of one process: those that it holds, and what it has seen of others'."""

    _held: dict[str, Claim] = field(default_factory=dict)  # by name
    # Others' last signs, and when each was seen first and last.
    _seen: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    _given_back: set[str] = field(default_factory=set)  # holders of claims that this process has held

    def take(self, name: str, *, is_here: bool = True) -> bool:
        """Take the claim of a name, unless another process holds it. Returns whether this process holds it now.

        is_here: whether the work ends with this process, so that the end of this process is the end of the claim.
        """
        others = _search_patiently(f"{name}-")
        if not all([self._is_abandoned(claim) for claim in others]):  # each is looked at, and its signs remembered
            return False
        number = max(map(_number, others), default=0) + 1
        return self._create(name, number, frozenset(map(_holder, others)), processes.identity() if is_here else "")

    def held(self, name: str) -> str:
        """What a claim that this process holds is called, and its holder (`leases`)."""
        claim = self._held[name]
        return f"{claim.full_name} {claim.holder}"

    def of_others(self, beginning: str) -> set[str]:
        """The names with a beginning whose claims other processes hold."""
        standing = [claim for claim in _search_patiently(beginning) if not self._is_abandoned(claim)]
        return set(map(_name, standing)) - self._held.keys()

    def abandoned(self, beginning: str) -> set[str]:
        """The names with a beginning that have claims of processes that have ended, which only `take` removes."""
        claims = _search_patiently(beginning)
        return {_name(claim) for claim in claims if self._is_abandoned(claim)} - self._held.keys()

    def release(self, name: str) -> None:
        """Give a claim back, when the work has ended and its outcome can be seen by all.

        It waits for a store that is away. Where the store refuses to remove the claim, this process may take it again,
        and others may when this process has ended.
        """
        claim = self._held.pop(name)
        self._given_back.add(claim.holder)
        with suppress(Refused, MlflowException, OSError):
            patiently("giving a claim back", lambda: _remove(claim))

    @contextmanager
    def giving_signs_of_life(self) -> Iterator[None]:
        """Within the block, a thread changes the tag plw.alive of all held claims every few seconds.

        Afterwards, those that are still held are removed, unless the store is away; this process is about to end, after
        which others outbid them.
        """
        client = mlflow.MlflowClient()

        def give_signs() -> None:
            for claim in list(self._held.values()):
                with suppress(Exception):  # of one claim, as the others need signs too
                    client.set_registered_model_tag(claim.full_name, "plw.alive", _sign())

        try:
            with signs.giving(give_signs, SIGN_SECONDS):
                yield
        finally:
            with suppress(Exception), hurried():
                while self._held:
                    _remove(self._held.popitem()[1])

    def _is_abandoned(self, claim: RegisteredModel) -> bool:
        if _holder(claim) in self._given_back:
            return True
        ended = processes.has_ended(claim.tags.get("plw.process", ""))
        if ended is not None:
            return ended
        sign = claim.tags.get("plw.alive", "") + _holder(claim)
        now = time.monotonic()
        seen, first, last = self._seen.get(claim.name, (None, now, now))
        if sign != seen or now - last > UNSEEN_SECONDS:
            first = now
        self._seen[claim.name] = (sign, first, now)
        return now - first > SILENT_SECONDS

    def _create(self, name: str, number: int, outbid: frozenset[str], process: str) -> bool:
        claim = Claim(name, number, uuid.uuid4().hex, outbid)
        tags = {"plw.holder": claim.holder, "plw.process": process, "plw.alive": _sign()}
        client = mlflow.MlflowClient()

        def create() -> bool:
            try:
                client.create_registered_model(claim.full_name, tags, DESCRIPTION)
            except MlflowException as error:
                # It existed, and may have been given back before MLflow looked at what exists.
                if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                    raise
                return _is_held_by(claim.full_name, claim.holder)  # the answer to an earlier attempt may have been lost
            return True

        self._held[name] = claim  # first, so that it is removed if this process is interrupted here
        try:
            is_created = patiently("claiming work", create)
            others = set(map(_holder, _search_patiently(f"{name}-"))) - {claim.holder} if is_created else set()
        except MlflowException:
            del self._held[name]
            raise
        if is_created and others <= outbid:
            return True
        del self._held[name]
        if is_created:
            with suppress(Refused, MlflowException, OSError):
                patiently("giving a claim back", lambda: _remove(claim, alone=True))
        return False


def _full_name(name: str, number: int) -> str:
    return f"{PREFIX}-{name}-{number}"


def _number(claim: RegisteredModel) -> int:
    return int(claim.name.rpartition("-")[2])


def _name(claim: RegisteredModel) -> str:
    return str(claim.name.removeprefix(f"{PREFIX}-").rpartition("-")[0])


def _holder(claim: RegisteredModel) -> str:
    return str(claim.tags.get("plw.holder", ""))


def _search_patiently(beginning: str) -> list[RegisteredModel]:
    """All claims whose names begin so. What else has such a name, but no number at its end, is none."""
    query = f"name LIKE '{PREFIX}-{beginning}%'"
    client = mlflow.MlflowClient()
    found = patiently("looking at claims", lambda: client.search_registered_models(query, max_results=1000))
    return [model for model in found if NUMBERED.search(model.name)]


def _is_held_by(full_name: str, holder: str) -> bool:
    """Whether there is a claim of that name and holder."""
    try:
        return _holder(mlflow.MlflowClient().get_registered_model(full_name)) == holder
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _remove(claim: Claim, *, alone: bool = False) -> None:
    """Remove a claim where it is still there and the holder's own, and, unless alone, those that it has outbid."""
    client = mlflow.MlflowClient()
    if not alone:
        for outbid in client.search_registered_models(f"name LIKE '{PREFIX}-{claim.name}-%'", max_results=1000):
            if _holder(outbid) in claim.outbid:
                _delete(outbid.name)
    if _is_held_by(claim.full_name, claim.holder):
        _delete(claim.full_name)


def _delete(full_name: str) -> None:
    with suppressing_missing(), hurried(retries=0):
        mlflow.MlflowClient().delete_registered_model(full_name)


def _sign() -> str:
    return f"{signs.now()} {uuid.uuid4().hex[:4]}"

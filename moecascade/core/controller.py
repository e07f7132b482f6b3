"""Which policy decides for which request: the one object that an engine adapter talks to.

Requests under the same spec share one policy object, so what it learns serves all of them. A policy
that raises costs its own requests their speculation and nothing else: they go on at K = 0, the
fault is reported, the other policies do not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, ParamSpec, TypeVar

from moecascade.core import registry
from moecascade.core.marginal.rule import prepare
from moecascade.core.options import (
    RequestOptions,
    ServerOptions,
    check_unseen,
    request_options,
    valid_request_options,
)
from moecascade.core.policy import Policy
from moecascade.core.spec import parse
from moecascade.core.step import Decision, Expectation, Proposal, Step
from moecascade.errors import ConfigError

MOST_SPECS = 32
"""Policies kept at once. Learning takes one 11 MB, and requests may ask for any."""

SLOW = 0.02  # seconds that a policy may take for a step now and then, but not always
MOST_SLOW = 8  # such steps, less those that were not, after which a policy is retired

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Group:
    """A policy object and the requests that it decides for."""

    spec: str
    policy: Policy
    members: set[str]
    spent: float = 0.0  # seconds, since it was last asked to decide
    slow: int = 0  # steps that took too long, less those that did not

    def is_too_slow(self) -> bool:
        """Judge what it took for the last step."""
        self.slow = self.slow + 1 if self.spent > SLOW else max(0, self.slow - 1)
        self.spent = 0.0
        return self.slow >= MOST_SLOW


class Controller:
    """Policies and requests of one engine.

    Args:
        options: The server's configuration.
        max_k: The longest draft that the engine can verify.
        on_fault: Told of each fault: what failed, and how and with what consequence.
        facts: What is known of the model, by the name of the setting in which policies take it
            (``experts``, ``top_k``). What the user configures comes first.
        shows_drafts: Whether proposals have tokens; policies that have to see them are refused
            where they have not.
        now: Gives the time in seconds, so that a policy that takes too long is found out.
    """

    def __init__(
        self,
        options: ServerOptions,
        max_k: int,
        on_fault: Callable[[str, str], None],
        facts: Mapping[str, Any] | None = None,
        shows_drafts: bool = True,
        now: Callable[[], float] = float,
    ) -> None:
        """Make the server's default policy, so that bad configuration shows now."""
        self._options = options
        self._max_k = max_k
        self._on_fault = on_fault
        self._facts = facts or {}
        self._shows_drafts = shows_drafts
        self._now = now
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, _Group | None] = {}
        self._caps: dict[str, int] = {}  # of the requests that have one of their own
        self._group(options.policy)
        if options.request_options:  # a request may be the first to ask for it
            prepare()

    def __len__(self) -> int:
        """Return how many requests are known."""
        return len(self._group_of)

    @property
    def policies(self) -> int:
        """How many policies are kept, each with what it has learnt."""
        return len(self._groups)

    def begin(
        self, request_id: str, extra_args: Mapping[str, Any] | None, prompt: Sequence[int] = ()
    ) -> RequestOptions:
        """A request begins, as its ``vllm_xargs`` ask; return what they ask and may.

        What cannot be granted is a fault, and the rest of it is done: `moecascade.vllm.http`
        refuses such requests where it is installed, here it is too late for that.
        """
        try:
            asked = request_options(extra_args, self._max_k, self.settings_of)
        except ConfigError as error:
            self._on_fault("request options", f"{error}; the request runs without this one")
            asked = valid_request_options(extra_args, self._max_k, self.settings_of)
        if not self._options.request_options:
            asked = RequestOptions(task=asked.task, report=asked.report)
        try:
            self.add(request_id, asked, prompt)
        except ConfigError as error:
            self._on_fault("policies", f"{error}; the request runs under the server's policy")
            asked = replace(asked, policy=None)
            self.add(request_id, asked, prompt)
        return asked

    def add(self, request_id: str, asked: RequestOptions, prompt: Sequence[int] = ()) -> None:
        """A request begins under the policy that it asked for, or the server's.

        One that had the same name before has ended.

        Raises:
            ConfigError: The request asks for a policy or K that does not exist, or for one more
                policy than can be kept.
        """
        group = self._group(asked.policy or self._options.policy)
        cap = self._max_k if asked.max_k is None else min(asked.max_k, self._max_k)
        self.drop(request_id)
        self._group_of[request_id] = group
        if cap < self._max_k:
            self._caps[request_id] = cap
        group.members.add(request_id)
        self._guarded(group, group.policy.add, request_id, cap, prompt)

    def drop(self, request_id: str) -> None:
        """A request ended, however it ended: forget it. Unknown names are ignored."""
        self._caps.pop(request_id, None)
        group = self._group_of.pop(request_id, None)
        if group is not None:
            group.members.discard(request_id)
            self._guarded(group, group.policy.drop, request_id)

    def observe(self, step: Step) -> None:
        """Show a step to every policy that has a request in it."""
        ids = [part.request_id for part in step.requests]
        for group in dict.fromkeys(map(self._group_of.get, ids)):
            if group is not None:
                self._guarded(group, group.policy.observe, step)

    def decide(self, proposals: Sequence[Proposal], explain: bool = False) -> dict[str, Decision]:
        """Return the decision for the next step of each request; K = 0 for unknown ones.

        Args:
            proposals: What the drafter has for each.
            explain: Whether decisions are to say what is expected of them. That takes time, and is
                of use in logs only.
        """
        decisions: dict[str, Decision] = {}
        for group, asked in self._by_group(proposals, [p.request_id for p in proposals]):
            slow = group is not None and group.is_too_slow()
            if group and slow:
                self._retire(group, f"it takes more than {SLOW * 1000:.0f} ms a step")
            made = (
                group and not slow and self._guarded(group, _decisions, group, asked, self._max_k)
            )
            if group and made and explain:
                made = self._explained(group, made)
            made = made or {p.request_id: Decision(p.request_id, 0, "fault") for p in asked}
            decisions = decisions | made if decisions else made
        for request_id, cap in self._caps.items():
            decision = decisions.get(request_id)
            if decision is not None and decision.k > cap:
                decisions[request_id] = replace(decision, k=cap)
        return decisions

    def drafts(self, request_ids: Sequence[str]) -> bool:
        """Return whether a draft of any of these could be wanted at all."""
        for request_id in request_ids:
            group = self._group_of.get(request_id)
            if group is not None and group.policy.drafts and self._caps.get(request_id, 1):
                return True
        return False

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the longest draft that any of these may want in the step after the next."""
        longest = 0
        for group, asked in self._by_group(request_ids, request_ids):
            if group is not None:
                k = self._guarded(group, _lookahead, group.policy, asked) or 0
                allowed = max(self._caps.get(request_id, self._max_k) for request_id in asked)
                longest = max(longest, min(k, allowed))
        return longest

    def _by_group(
        self, asked: Sequence[T], request_ids: Sequence[str]
    ) -> Iterator[tuple[_Group | None, Sequence[T]]]:
        """Yield the policies of requests, each with what is asked about those that are its own."""
        groups = list(map(self._group_of.get, request_ids))
        different = dict.fromkeys(groups)
        for group in different:
            if len(different) == 1:
                yield group, asked
            else:
                yield group, [one for one, of in zip(asked, groups, strict=True) if of is group]

    def _explained(self, group: _Group, decisions: dict[str, Decision]) -> dict[str, Decision]:
        """Return decisions with what is expected of them; without where that cannot be said."""
        try:
            return {
                request_id: replace(decision, expected=_expected(group.policy, decision))
                for request_id, decision in decisions.items()
            }
        except Exception as fault:  # noqa: BLE001 -- a log is no reason to give up a policy
            what = f"explanation of policy {group.spec!r}"
            self._on_fault(what, f"{fault!r}; what it expects is not logged")
            return decisions

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return the settings of a policy that no spec says: see `ServerOptions.settings_of`."""
        return self._options.settings_of(name, self._facts)

    def spec(self, request_id: str) -> str:
        """Return the spec of the policy that decides for a request, "" where none does."""
        group = self._group_of.get(request_id)
        return group.spec if group is not None else ""

    def _group(self, spec: str) -> _Group:
        group = self._groups.get(spec)
        if group is None:
            if not self._shows_drafts:
                check_unseen(spec)
            if spec != self._options.policy:
                self._make_room()
            settings = self.settings_of(parse(spec).name)
            group = _Group(spec, registry.create(spec, self._max_k, settings), set())
            self._groups[spec] = group
        return group

    def _make_room(self) -> None:
        """Forget the oldest policy that nobody uses; ConfigError where all are in use."""
        if len(self._groups) < MOST_SPECS:
            return
        for spec, group in self._groups.items():
            if not group.members and spec != self._options.policy:
                del self._groups[spec]
                return
        raise ConfigError(
            f"{MOST_SPECS} different policies are in use, and no more are kept at once; ask for "
            "one of them"
        )

    def _guarded(self, group: _Group, call: Callable[P, R], *a: P.args, **k: P.kwargs) -> R | None:
        """Return what `call` returns; where it raises, retire the policy object and return None."""
        began = self._now()
        try:
            return call(*a, **k)
        except Exception as fault:  # noqa: BLE001 -- no fault of a policy may reach the engine
            self._retire(group, repr(fault))
            return None
        finally:
            group.spent += self._now() - began

    def _retire(self, group: _Group, why: str) -> None:
        """Use a policy object no more; its state can no longer be trusted.

        Its requests go on without drafts, the next ones get a fresh object.
        """
        for member in group.members:
            self._group_of[member] = None
        self._groups.pop(group.spec, None)
        self._on_fault(f"policy {group.spec!r}", f"{why}; its requests go on without drafts")


def _decisions(group: _Group, proposals: Sequence[Proposal], max_k: int) -> dict[str, Decision]:
    """Return the policy's decisions on `proposals`; ValueError where they are not usable."""
    decisions = group.policy.decide(proposals)
    by_id = {d.request_id: d for d in decisions}
    if len(decisions) != len(by_id) or list(by_id) != [p.request_id for p in proposals]:
        raise ValueError(f"policy {group.spec!r} decided for other requests than it was asked for")
    ks = [d.k for d in decisions]
    if min(different := set(ks)) < 0 or max(different) > max_k:
        raise ValueError(f"policy {group.spec!r} decided a K outside 0..{max_k}: {decisions}")
    if set(map(type, ks)) != {int}:  # NumPy's, say, which JSON does not know
        return {id_: replace(d, k=index(d.k)) for id_, d in by_id.items()}
    return by_id


def _lookahead(policy: Policy, request_ids: Sequence[str]) -> int:
    """Return how far the policy wants drafts; TypeError where it says no whole number."""
    return index(policy.lookahead(request_ids))


def _expected(policy: Policy, decision: Decision) -> Expectation | None:
    """Return what the policy expects of a decision; TypeError where it says something else."""
    expected: object = policy.explain(decision.request_id) or decision.expected
    if expected is None or isinstance(expected, Expectation):
        return expected
    raise TypeError(f"explain returned {expected!r:.80}, not an Expectation or None")

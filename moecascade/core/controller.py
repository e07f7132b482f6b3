"""Which policy decides for which request: the one object that an engine adapter talks to.

Requests under the same spec share one policy object, so what it learns serves all of them. A policy
that raises costs its own requests their speculation and nothing else: they go on at K = 0, the
fault is reported, the other policies do not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, ParamSpec, TypeVar

from moecascade.core import registry
from moecascade.core.options import RequestOptions, ServerOptions
from moecascade.core.policy import Policy
from moecascade.core.spec import parse
from moecascade.core.step import Decision, Proposal, Step
from moecascade.errors import ConfigError

MOST_SPECS = 32
"""Policies kept at once. Learning takes one 10 MB, in time 30, and requests may ask for any."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Group:
    """A policy object and the requests that it decides for."""

    spec: str
    policy: Policy
    members: set[str]


class Controller:
    """Policies and requests of one engine.

    Args:
        options: The server's configuration.
        max_k: The longest draft that the engine can verify.
        on_fault: Told of each fault: the spec of the policy and what it raised.
        facts: What is known of the model, by the name of the setting in which policies take it
            (``experts``, ``top_k``). What the user configures comes first.
    """

    def __init__(
        self,
        options: ServerOptions,
        max_k: int,
        on_fault: Callable[[str, Exception], None],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the server's default policy, so that bad configuration shows now."""
        self._options = options
        self._max_k = max_k
        self._on_fault = on_fault
        self._facts = facts or {}
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, _Group | None] = {}
        self._group(options.policy)

    def __len__(self) -> int:
        """Return how many requests are known."""
        return len(self._group_of)

    def add(self, request_id: str, asked: RequestOptions, prompt: Sequence[int] = ()) -> None:
        """A request begins under the policy that it asked for, or the server's.

        Raises:
            ConfigError: The request asks for a policy or K that does not exist, or for one more
                policy than can be kept.
        """
        group = self._group(asked.policy or self._options.policy)
        cap = self._max_k if asked.max_k is None else min(asked.max_k, self._max_k)
        self._group_of[request_id] = group
        group.members.add(request_id)
        self._guarded(group, group.policy.add, request_id, cap, prompt)

    def drop(self, request_id: str) -> None:
        """A request ended, however it ended: forget it. Unknown names are ignored."""
        group = self._group_of.pop(request_id, None)
        if group is not None:
            group.members.discard(request_id)
            self._guarded(group, group.policy.drop, request_id)

    def observe(self, step: Step) -> None:
        """Show a step to every policy that has a request in it."""
        group_of = self._group_of.get
        for group in dict.fromkeys([group_of(part.request_id) for part in step.requests]):
            if group is not None:
                self._guarded(group, group.policy.observe, step)

    def decide(self, proposals: Sequence[Proposal]) -> dict[str, Decision]:
        """Return the decision for the next step of each request; K = 0 for unknown ones."""
        group_of = self._group_of.get
        groups = [group_of(proposal.request_id) for proposal in proposals]
        different = dict.fromkeys(groups)
        decisions: dict[str, Decision] = {}
        for group in different:
            members = proposals
            if len(different) > 1:
                members = [p for p, of in zip(proposals, groups, strict=True) if of is group]
            made = group and self._guarded(group, _decisions, group, members, self._max_k)
            decisions |= made or {p.request_id: Decision(p.request_id, 0, "fault") for p in members}
        return decisions

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the longest draft that any of these may want in the step after the next."""
        longest = 0
        for request_id in request_ids:
            group = self._group_of.get(request_id)
            if group is not None:
                k = self._guarded(group, _lookahead, group.policy, request_id)
                longest = max(longest, min(k or 0, self._max_k))
        return longest

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return the settings of a policy that no spec says: see `ServerOptions.settings_of`."""
        return self._options.settings_of(name, self._facts)

    def spec(self, request_id: str) -> str:
        """Return the spec of the policy that decides for a request, "" where none does."""
        group = self._group_of.get(request_id)
        return group.spec if group is not None else ""

    def explain(self, request_id: str) -> Mapping[str, Any]:
        """Return the parts of the request's last decision, empty where no policy decides.

        For logs; what a policy raises here is the caller's, and does not retire it.
        """
        group = self._group_of.get(request_id)
        if group is None:
            return {}
        return group.policy.explain(request_id) or {}

    def _group(self, spec: str) -> _Group:
        group = self._groups.get(spec)
        if group is None:
            if spec != self._options.policy:
                self._make_room()
            settings = self.settings_of(parse(spec)[0])
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
        try:
            return call(*a, **k)
        except Exception as fault:  # noqa: BLE001 -- no fault of a policy may reach the engine
            # Its state can no longer be trusted: its requests go on without, the next ones get a
            # fresh object.
            for member in group.members:
                self._group_of[member] = None
            group.members.clear()
            self._groups.pop(group.spec, None)
            self._on_fault(group.spec, fault)
            return None


def _decisions(group: _Group, proposals: Sequence[Proposal], max_k: int) -> dict[str, Decision]:
    """Return the policy's decisions on `proposals`; ValueError where they are not usable."""
    decisions = group.policy.decide(proposals)
    by_id = {d.request_id: d for d in decisions}
    if len(decisions) != len(by_id) or list(by_id) != [p.request_id for p in proposals]:
        raise ValueError(f"policy {group.spec!r} decided for other requests than it was asked for")
    ks = [d.k for d in decisions]
    if min(ks) < 0 or max(ks) > max_k:
        raise ValueError(f"policy {group.spec!r} decided a K outside 0..{max_k}: {decisions}")
    if set(map(type, ks)) != {int}:  # NumPy's, say, which JSON does not know
        return {id_: replace(d, k=index(d.k)) for id_, d in by_id.items()}
    return by_id


def _lookahead(policy: Policy, request_id: str) -> int:
    """Return how far the policy wants drafts; TypeError where it says no whole number."""
    return index(policy.lookahead(request_id))

"""What a policy is to the report, told by its spec: here and nowhere else."""

from __future__ import annotations

from moecascade.core import registry
from moecascade.core.spec import parse
from moecascade.evaluation.request_record import BASELINE, PLAIN

OURS = ("cascade", "marginal")
"""The policies that this package is for: the paper's, and the default."""
PEERS = tuple(peer.name for peer in registry.PEERS)
"""What others use."""
HINDSIGHT = "best static K"
"""Stands in the place of a policy for the fixed K that was best under a condition."""


def static_k(policy: str) -> int | None:
    """Return the K of a fixed draft length, None for any other policy."""
    return parse(policy).static_k


def varied(policy: str) -> bool:
    """Return whether a policy's settings are not its own: an ablation."""
    return bool(parse(policy).settings)


def adapts(policy: str) -> bool:
    """Return whether a policy chooses K as it goes."""
    return policy not in (BASELINE, PLAIN, HINDSIGHT) and static_k(policy) is None


def described(policy: str) -> str:
    """Return what a policy is in a few words, "" where it is none of those registered."""
    spec = parse(policy)
    if spec.settings:
        said = ", ".join(f"{name} = {value}" for name, value in spec.settings.items())
        return f"{spec.name} with {said}"
    known = registry.classes().get(spec.name)
    return "" if known is None else (known.__doc__ or "").partition("\n")[0].rstrip(".")

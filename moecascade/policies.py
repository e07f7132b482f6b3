"""The public face of the policies: what a spec is, which there are, how to add one.

A policy is a class derived from `Policy`, with a name and a way to decide, passed to `register`.
`core.registry` says how other processes, the engine's for one, come to know it.
"""

from moecascade.core.policy import Policy
from moecascade.core.registry import (
    ANY_K,
    OURS,
    PEERS,
    applicable,
    classes,
    create,
    learns,
    names,
    register,
    settings_for,
)
from moecascade.core.spec import Spec, parse, split
from moecascade.core.step import Decision, Expectation, Proposal, RequestStep, Step

__all__ = [
    "ANY_K",
    "OURS",
    "PEERS",
    "Decision",
    "Expectation",
    "Policy",
    "Proposal",
    "RequestStep",
    "Spec",
    "Step",
    "applicable",
    "classes",
    "create",
    "learns",
    "names",
    "parse",
    "register",
    "settings_for",
    "split",
]

"""The public face of the policies: what a spec is, which there are, how to add one.

Adding one takes one class with the members of `Policy`, passed to `register`.
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
)
from moecascade.core.spec import parse, split

__all__ = [
    "ANY_K",
    "OURS",
    "PEERS",
    "Policy",
    "applicable",
    "classes",
    "create",
    "learns",
    "names",
    "parse",
    "register",
    "split",
]

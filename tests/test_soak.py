"""A server under all that clients do to it, for some minutes: nothing lost, wrong, or left."""

from __future__ import annotations

import re

import pytest

from tests.beside import Beside


@pytest.mark.engine
def test_a_soak_of_some_minutes_leaves_all_as_it_should_be(soak_run: Beside):
    status, said = soak_run.wait()
    print(said)
    assert status == 0, said[-5000:]
    sent = re.search(r"requests sent\W+(\d+)", said)
    assert sent
    assert int(sent[1]) > 100

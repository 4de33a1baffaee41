"""No way to train on many processes is plain SGD in silence: two processes, each of which has to be refused."""

from __future__ import annotations

import groups
import pytest
import sharded_refusals


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> groups.Outcomes:
    return groups.run("sharded_refusals", groups.checks_of(sharded_refusals), tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", groups.checks_of(sharded_refusals))
def test_on_two_processes(outcomes: groups.Outcomes, name: str) -> None:
    assert outcomes[name] == ["", ""], "\n".join(outcomes[name])

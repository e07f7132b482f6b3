"""What stands in deploy/ and docs/deploy.md is what the commands and vLLM take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from moecascade.serving import command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "deploy.md"
COMMANDS = sorted({
    found.strip("` ")
    for found in re.findall(r"moecascade serve [A-Za-z][^`|#\n]*", DOCS.read_text())
    if "..." not in found
})  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_docs_can_be_planned(line: str):
    _, _, model, *flags = shlex.split(line)
    policy = flags[flags.index("--policy") + 1] if "--policy" in flags else None
    if policy is not None:
        flags = []
    planned = command.plan(model, flags, policy=policy)
    assert model in planned.command
    assert command.SCHEDULER in planned.command
    assert all(flag in planned.command for flag in flags if flag.startswith("--"))


def test_there_are_commands():
    assert len(COMMANDS) >= 8


def test_kubernetes_asks_the_paths_and_port_that_the_server_has():
    deployment, claim, service = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    planned = command.plan(container["args"][0], container["args"][1:])
    (port,) = container["ports"]
    assert planned.port == port["containerPort"] == service["spec"]["ports"][0]["port"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(planned.port)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert claim["metadata"]["name"] == "models"
    assert service["spec"]["selector"] == pod["metadata"]["labels"]


def test_the_image_is_made_of_what_a_clone_has():
    text = (ROOT / "deploy/Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
    assert 'ENTRYPOINT ["moecascade", "serve"]' in text

"""What is in ``deploy/`` fits the commands and the settings as they are now; no container engine and no cluster is asked."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from knnlm_server.configuration import Setting, settings_of
from knnlm_server.serve_command import serve

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
KUBERNETES = ROOT / "deploy" / "kubernetes"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def settings() -> dict[str, Setting]:
    return settings_of(serve)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def document(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = document(name, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def configuration() -> dict[str, Any]:
    return tomllib.loads(document("knnlm.yaml", "ConfigMap")["data"]["knnlm.toml"])


def instructions(word: str) -> list[str]:
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [line.removeprefix(word).strip() for line in joined.splitlines() if line.startswith(f"{word} ")]


def test_the_configuration_is_one_that_the_server_takes() -> None:
    known = settings()
    for name, value in configuration().items():
        known[name].from_file(value)


@pytest.mark.parametrize("name", ["knnlm.yaml", "tls.yaml"])
def test_variables_of_the_environment_are_settings(name: str) -> None:
    variables = {setting.variable: setting for setting in settings().values()}
    for variable in container(name).get("env", []):
        variables[variable["name"]].from_variable(variable["value"])


def test_arguments_are_those_of_the_command() -> None:
    command, *options = container("knnlm.yaml")["args"]
    assert command == "serve"
    assert {option.removeprefix("--").replace("-", "_") for option in options[::2]} <= set(settings())


def test_every_file_that_is_named_is_mounted() -> None:
    mounts = {mount["name"]: PurePosixPath(mount["mountPath"]) for mount in container("knnlm.yaml")["volumeMounts"]}
    mounts |= {mount["name"]: PurePosixPath(mount["mountPath"]) for mount in container("tls.yaml")["volumeMounts"]}
    given = configuration()
    paths = [given["tokens"], given["model"], *given["datastores"].values(), container("knnlm.yaml")["args"][-1]]
    paths += [variable["value"] for variable in container("tls.yaml")["env"]]
    for path in paths:
        assert any(mount in PurePosixPath(path).parents for mount in mounts.values()), path
    volumes = {volume["name"] for name in ("knnlm.yaml", "tls.yaml") for volume in _pod(name)["volumes"]}
    assert volumes == set(mounts)


def _pod(name: str) -> dict[str, Any]:
    return dict(document(name, "Deployment")["spec"]["template"]["spec"])


def test_ports_are_those_of_the_configuration() -> None:
    given, ports = configuration(), {port["name"]: port["containerPort"] for port in container("knnlm.yaml")["ports"]}
    assert ports == {"grpc": given["port"], "metrics": given["metrics_port"]}
    assert {container("knnlm.yaml")[probe]["grpc"]["port"] for probe in PROBES} == {given["port"]}
    assert [port["targetPort"] for port in document("knnlm.yaml", "Service")["spec"]["ports"]] == ["grpc"]


def test_readiness_is_asked_of_the_service_itself() -> None:
    from knnlm_server.service import SERVICE_NAME

    assert container("knnlm.yaml")["readinessProbe"]["grpc"]["service"] == SERVICE_NAME


def test_running_requests_have_their_grace_before_a_pod_is_killed() -> None:
    sleep = int(container("knnlm.yaml")["lifecycle"]["preStop"]["exec"]["command"][1])
    assert _pod("knnlm.yaml")["terminationGracePeriodSeconds"] >= sleep + configuration()["grace"] + 5


def test_the_server_plans_with_less_memory_than_its_pod_has() -> None:
    from knnlm.byte_sizes import parse_bytes

    resources = container("knnlm.yaml")["resources"]
    assert parse_bytes("memory", configuration()["memory"]) < parse_bytes("memory", f"{resources['limits']['memory']}B")
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_nothing_runs_as_root() -> None:
    (user,) = instructions("USER")
    assert int(user) > 0
    assert _pod("knnlm.yaml")["securityContext"]["runAsUser"] == int(user)
    assert f"--uid {user}" in DOCKERFILE.read_text()


def test_tls_replaces_every_probe() -> None:
    probe = document("probe.yaml", "ConfigMap")
    ((script, text),) = probe["data"].items()
    for name in PROBES:
        changed = container("tls.yaml")[name]
        assert changed["grpc"] is None
        assert PurePosixPath(changed["exec"]["command"][1]).name == script
    _check_client_code(text)
    assert set(yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]) == {"knnlm.yaml", "probe.yaml"}


def test_the_image_copies_what_there_is() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in instructions("COPY"):
        if not line.startswith("--from"):
            for source in shlex.split(line)[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source


def test_the_image_takes_extras_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "tracing"} <= set(extras)
    assert '".[$DEVICE,tracing]"' in DOCKERFILE.read_text()


def test_the_image_asks_its_server_as_a_client_can() -> None:
    health = DOCKERFILE.read_text().split("HEALTHCHECK")[1]
    _check_client_code(ast.literal_eval(re.search(r"\[.*\]", health)[0])[2])  # type: ignore[index]
    assert "KNNLM_SERVE_HOST" in {setting.variable for setting in settings().values()}


def _check_client_code(text: str) -> None:
    """Python code whose imports work and whose clients have the methods that are called."""
    from knnlm_server import client

    tree = ast.parse(text)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert imported
    assert all(hasattr(client, name) for name in imported)
    called = [node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert called
    assert all(hasattr(client.GenerationClient, name) for name in called)

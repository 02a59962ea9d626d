"""What docs/deploy holds starts a server as documented, and its parts agree with each other and with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from kvferry.connector.errors import ConfigError
from kvferry.connector.schema import parse_size
from kvferry.connector.server.access import Access, default_socket
from kvferry.connector.server.config import ServerConfig, ServerSettings
from kvferry.connector.server.settings import load_server_settings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "docs" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CONFIG_PATH = "/etc/kvferry/kvferry.toml"
HTTP_PORT = int(ServerConfig().http.rpartition(":")[2])
BESIDE_DRAINING_S = 40
GIB = 1 << 30


def manifest(name: str) -> dict[str, Any]:
    (found,) = yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


POD = manifest("daemonset")["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
(DIRECTORIES,) = POD["initContainers"]
PORTS = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
UNIT = (DEPLOY / "kvferry.service").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def unit(key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def settings_of(path: Path, **environ: str) -> ServerSettings:
    return load_server_settings(str(path), environ)


@pytest.fixture
def pods_file(tmp_path: Path) -> Path:
    file = tmp_path / "kvferry.toml"
    file.write_text(manifest("config")["data"]["kvferry.toml"])
    return file


def test_the_file_to_copy_is_a_servers_and_says_what_is_the_default_already() -> None:
    settings = settings_of(DEPLOY / "kvferry.toml")
    assert Access(settings.server, settings.tenants).warnings == ()
    assert settings.server.listen == (default_socket({}),)
    assert settings.server.http == ServerConfig().http
    assert settings.server.drain_s == ServerConfig().drain_s


def test_its_commented_lines_are_valid_too(tmp_path: Path) -> None:
    text = (DEPLOY / "kvferry.toml").read_text()
    assert re.search(r"^# listen = ", text, re.MULTILINE)
    whole = re.sub(r"^listen = .*\n", "", text, flags=re.MULTILINE)
    whole = re.sub(r"^# (\w+ = |\[)", r"\1", whole, flags=re.MULTILINE).replace('secret = ""', "")
    file = tmp_path / "kvferry.toml"
    file.write_text(whole)
    settings = settings_of(file)
    assert len(settings.server.listen) == 2
    assert [tenant.name for tenant in settings.tenants] == ["search"]
    Access(settings.server, settings.tenants)


def test_the_units_paths_and_times_are_the_files() -> None:
    settings = settings_of(DEPLOY / "kvferry.toml")
    (disk,) = settings.cache.tiers
    assert unit("ExecStart").endswith(f"/kvferry serve --config {CONFIG_PATH}")
    assert f"/run/{unit('RuntimeDirectory')}" == str(Path(urlsplit(settings.server.listen[0]).path).parent)
    assert f"/var/lib/{unit('StateDirectory')}" == disk["path"]
    assert float(unit("TimeoutStopSec")) >= settings.server.drain_s + BESIDE_DRAINING_S
    assert unit("Type") == "exec", "nothing tells systemd that the server is ready"
    assert unit("RuntimeDirectoryPreserve") == "yes", "containers mount it"
    assert "PrivateUsers=" not in UNIT, "the kernel has to tell who connects"
    assert float(unit("LimitNOFILE")) > 3 * settings.server.max_connections


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    installed = tmp_path / "kvferry.service"
    installed.write_text(UNIT.replace("/opt/kvferry/bin/kvferry", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(installed)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_image_runs_the_server_as_nobody_special() -> None:
    settings = settings_of(DEPLOY / "kvferry.toml")
    lines = DOCKERFILE.splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER kvferry"]
    assert f"http://127.0.0.1:{settings.server.http.rpartition(':')[2]}/healthz" in DOCKERFILE
    assert f'CMD ["serve", "--config", "{CONFIG_PATH}"]' in lines
    (disk,) = settings.cache.tiers
    assert f'VOLUME ["/run/kvferry", "{disk["path"]}"]' in lines
    assert f"EXPOSE {PORTS['stream']} {HTTP_PORT}" in lines
    assert f"ARG UID={SERVER['securityContext']['runAsUser']}" in lines
    offered = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r'"/src\[(.*)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(offered)
    assert "vllm" not in extras, "torch has no place in a server"


def test_only_what_the_image_needs_is_sent_to_its_builder() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert [path for path in sent if not (REPOSITORY / path).exists()] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["sources"], project["project"]["readme"], *project["project"]["license-files"]} < sent
    copied = re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert set(copied) - {"."} <= sent


def test_the_pods_configuration_needs_its_token(pods_file: Path) -> None:
    with_token = settings_of(pods_file, KVFERRY_TOKEN="x" * 64)
    Access(with_token.server, with_token.tenants)
    without = settings_of(pods_file, KVFERRY_TOKEN="")
    with pytest.raises(ConfigError, match="refuses to start"):
        Access(without.server, without.tenants)
    (variable,) = SERVER["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    secret = manifest("secret")
    assert (variable["name"], reference["name"]) == ("KVFERRY_TOKEN", secret["metadata"]["name"])
    assert secret["stringData"] == {reference["key"]: ""}, "no token that somebody would leave as it is"


def test_every_port_is_the_same_everywhere(pods_file: Path) -> None:
    server = settings_of(pods_file).server
    addresses = [*server.listen, f"//{server.http}", server.events, server.events_replay]
    assert {urlsplit(address).port for address in addresses if not address.startswith("unix:")} == set(
        PORTS.values()
    )
    assert PORTS["http"] == HTTP_PORT
    service = manifest("service")["spec"]
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == PORTS
    rules = manifest("networkpolicy")["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == set(PORTS)
    assert all(rule["from"] for rule in rules), "nobody is let in without a reason"
    (endpoint,) = manifest("servicemonitor")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_probes_ask_what_they_should() -> None:
    asked = {
        name: (SERVER[name]["httpGet"]["path"], SERVER[name]["httpGet"]["port"])
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert asked == {
        "startupProbe": ("/healthz", "http"),
        "livenessProbe": ("/healthz", "http"),
        "readinessProbe": ("/readyz", "http"),
    }


def test_the_pod_has_the_memory_that_it_takes(pods_file: Path) -> None:
    settings = settings_of(pods_file)
    arenas = settings.cache.host.capacity * settings.server.max_models
    limit = parse_size(SERVER["resources"]["limits"]["memory"] + "B", "memory")
    assert limit >= arenas + 4 * GIB
    assert SERVER["resources"]["requests"]["memory"] == SERVER["resources"]["limits"]["memory"]


def test_the_pod_has_the_time_that_it_takes(pods_file: Path) -> None:
    assert POD["terminationGracePeriodSeconds"] >= settings_of(pods_file).server.drain_s + BESIDE_DRAINING_S


def test_everything_the_configuration_names_is_mounted(pods_file: Path) -> None:
    settings = settings_of(pods_file)
    mounts = {mount["mountPath"]: mount["name"] for mount in SERVER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert set(mounts.values()) == set(volumes)
    (disk,) = settings.cache.tiers
    socket = Path(default_socket({}).removeprefix("unix://"))
    assert f"unix://{socket}" in settings.server.listen
    tls = Path(settings.server.tls.certificate).parent
    for needed in (str(socket.parent), disk["path"], str(tls), CONFIG_PATH):
        assert needed in mounts
    assert SERVER["args"] == ["serve", "--config", CONFIG_PATH]
    assert volumes["config"]["configMap"]["name"] == manifest("config")["metadata"]["name"]
    owned = {mount["mountPath"] for mount in DIRECTORIES["volumeMounts"]}
    assert owned == {path for path, name in mounts.items() if "hostPath" in volumes[name]}


def test_the_pod_may_do_nothing_that_it_need_not() -> None:
    context = SERVER["securityContext"]
    assert context["runAsNonRoot"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not POD["automountServiceAccountToken"]
    assert "hostPID" not in POD, "descriptors are handed over; nobody looks into another's process"
    assert "hostIPC" not in POD
    uid = context["runAsUser"]
    assert f"chown {uid}:{uid} " in DIRECTORIES["command"][-1]


def test_all_select_the_same_pods() -> None:
    labels = manifest("daemonset")["spec"]["template"]["metadata"]["labels"]
    assert manifest("daemonset")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == labels
    selected = manifest("servicemonitor")["spec"]["selector"]["matchLabels"]
    assert selected.items() <= manifest("service")["metadata"]["labels"].items()


def test_kustomize_takes_all_but_what_needs_an_operator() -> None:
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(manifest("kustomization")["resources"]) == files - {"servicemonitor.yaml"}


def test_images_are_the_readers_own() -> None:
    images = {container["image"] for container in (SERVER, DIRECTORIES)}
    assert images == {"kvferry:local"}
    assert "docker build -f docs/deploy/Dockerfile -t kvferry:local ." in DOCKERFILE

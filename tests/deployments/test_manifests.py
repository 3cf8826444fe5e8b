from __future__ import annotations

import asyncio
import configparser
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from docker.types import HostConfig
from jsonschema import Draft202012Validator
from prefect.client.orchestration import PrefectClient
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from flows.commands.main import app
from storage_schemas.workspace import Workspace
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.server import DRAIN_SECONDS
from tasks.serving.http.settings import Limits
from tasks.watching.metrics_exporter import exposition

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
KUBERNETES = sorted((DEPLOYMENTS / "kubernetes").glob("*.yaml"))
POOLS = ("process", "docker", "kubernetes")
PREFECT_VERSION = "3.8.8"


def manifests() -> list[dict[str, Any]]:
    return [document for path in KUBERNETES for document in yaml.safe_load_all(path.read_text())]


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in manifests() if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """The pod of every workload, by the workload's name."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for each in manifests()
        if each["kind"] in ("Deployment", "StatefulSet")
    }


def environment(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in pod["containers"][0].get("env", [])}


def pool(name: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((DEPLOYMENTS / "pools" / f"{name}.json").read_text())
    return template


def job(name: str, **variables: object) -> dict[str, Any]:
    """What a worker of the pool makes of its template for one job."""

    class Configuration(BaseJobConfiguration, extra="allow"):
        pass

    # No server is asked: the templates refer to no block and no variable of one.
    nobody = cast(PrefectClient, object())
    made = asyncio.run(Configuration.from_template_and_values(pool(name), variables, client=nobody))
    return made.model_dump()


def test_every_manifest_lies_in_the_namespace_and_has_a_name_of_its_own() -> None:
    named = [(each["kind"], each["metadata"]["name"]) for each in manifests()]
    assert len(set(named)) == len(named)
    assert all(each["apiVersion"] for each in manifests())
    others = [each for each in manifests() if each["kind"] != "Namespace"]
    assert {each["metadata"]["namespace"] for each in others} == {"fastgda"}
    assert {kind for kind, _ in named} == {
        "Namespace",
        "PersistentVolumeClaim",
        "Service",
        "StatefulSet",
        "Deployment",
        "ServiceAccount",
        "Role",
        "RoleBinding",
    }


def test_what_is_selected_and_mounted_is_there() -> None:
    labels = {}
    for each in manifests():
        if each["kind"] in ("Deployment", "StatefulSet"):
            found = each["spec"]["template"]["metadata"]["labels"]
            labels[found["app.kubernetes.io/name"]] = each
            assert each["spec"]["selector"]["matchLabels"].items() <= found.items()
    for each in manifests():
        if each["kind"] == "Service":
            target = labels[each["spec"]["selector"]["app.kubernetes.io/name"]]
            (container,) = target["spec"]["template"]["spec"]["containers"]
            assert each["spec"]["ports"][0]["port"] in [port["containerPort"] for port in container["ports"]]
    claims = {each["metadata"]["name"] for each in manifests() if each["kind"] == "PersistentVolumeClaim"}
    for pod in pods().values():
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        mounts = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
        assert {volume["name"] for volume in pod.get("volumes", [])} <= mounts
    assert pool("kubernetes")["variables"]["properties"]["workspace_claim"]["default"] in claims
    assert manifest("PersistentVolumeClaim", "fastgda-workspace")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_passwords_come_from_the_secret_that_its_comment_makes() -> None:
    assert not [each for each in manifests() if each["kind"] == "Secret"]
    found = {}
    for name, pod in pods().items():
        for variable, entry in environment(pod).items():
            if re.search("PASSWORD|SECRET|TOKEN|KEY|CONNECTION_URL", variable):
                assert "value" not in entry
                found[name, variable] = entry["valueFrom"]["secretKeyRef"]
            assert not re.search(r"://[^/\s]*:[^/\s]*@", str(entry.get("value", "")))
    assert set(found) == {
        ("fastgda-postgres", "POSTGRES_PASSWORD"),
        ("prefect-server", "PREFECT_API_DATABASE_CONNECTION_URL"),
    }
    comment = (DEPLOYMENTS / "kubernetes" / "postgres.yaml").read_text()
    assert {reference["name"] for reference in found.values()} == {"fastgda-database"}
    assert "secret generic fastgda-database" in comment
    assert all(f"--from-literal={reference['key']}=" in comment for reference in found.values())
    address = manifest("Service", "fastgda-postgres")
    assert f"@{address['metadata']['name']}:{address['spec']['ports'][0]['port']}/" in comment


def test_the_prefect_server_is_the_release_we_lock_and_reports_nothing() -> None:
    server = pods()["prefect-server"]
    assert server["containers"][0]["image"] == f"prefecthq/prefect:{PREFECT_VERSION}-python3.12"
    assert f"prefect=={PREFECT_VERSION}\n" in (ROOT / "requirements.lock").read_text()
    assert environment(server)["PREFECT_SERVER_ANALYTICS_ENABLED"]["value"] == "false"
    # Kubernetes would set PREFECT_SERVER_PORT and more for the service's sake, which Prefect takes for its settings.
    assert all(pod["enableServiceLinks"] is False for name, pod in pods().items() if name.startswith("prefect"))


def test_workers_may_do_what_they_must_and_no_more() -> None:
    role = manifest("Role", "prefect-worker")
    verbs = {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}
    assert verbs["jobs"] >= {"create", "delete", "get", "list", "watch"}
    assert all(verbs[name] == {"get", "list", "watch"} for name in ("pods", "pods/log", "events"))
    assert "*" not in str(role["rules"])
    assert not {"secrets", "pods/exec"} & set(verbs)
    binding = manifest("RoleBinding", "prefect-worker")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == manifest("ServiceAccount", "prefect-worker")["metadata"]["name"]
    holders = [name for name, pod in pods().items() if pod.get("serviceAccountName") == "prefect-worker"]
    assert holders == ["prefect-worker-gpu", "prefect-worker-coordinators"]
    others = [pod for name, pod in pods().items() if name not in holders]
    assert all(pod["automountServiceAccountToken"] is False for pod in others)


def test_workers_poll_the_pools_that_the_flows_are_deployed_to_and_make_none_themselves() -> None:
    polled = set()
    for name in ("prefect-worker-gpu", "prefect-worker-coordinators"):
        worker = pods()[name]
        arguments = worker["containers"][0]["args"]
        polled |= {word.removeprefix("--pool=") for word in arguments if word.startswith("--pool=")}
        assert {"--type=kubernetes", "--no-create-pool-if-not-found"} <= set(arguments)
        assert environment(worker)["PREFECT_API_URL"]["value"] == "http://prefect-server:4200/api"
        assert environment(worker)["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"]["value"] == "fastgda"
    assert polled == {"fastgda-gpu", "fastgda"}
    assert manifest("Service", "prefect-server")["spec"]["ports"][0]["port"] == 4200


def test_prometheus_finds_the_exporter() -> None:
    deployment = manifest("Deployment", "fastgda-metrics")
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    (container,) = pods()["fastgda-metrics"]["containers"]
    words = container["args"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["fastgda", "metrics"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == given["--port"] == str(container["ports"][0]["containerPort"])
    assert given["--host"] == "0.0.0.0"
    assert given["--workspace"] == container["volumeMounts"][0]["mountPath"]


def test_the_service_is_started_as_its_command_reads_and_may_write_nothing_but_temporary_files() -> None:
    pod = pods()["fastgda-service"]
    (container,) = pod["containers"]
    words = container["args"]
    assert words[0] == "fastgda" and words[3] == "serve"
    parsed = get_command(app).make_context("fastgda", words[1:], resilient_parsing=True)
    command = get_command(app).get_command(parsed, "serve")
    assert command is not None
    given = command.make_context("serve", words[4:]).params
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert given["workspace"] == mounts["workspace"]["mountPath"]
    assert given["keys"].parent == Path(mounts["keys"]["mountPath"])
    assert given["port"] == container["ports"][0]["containerPort"]
    assert [name for name, mount in mounts.items() if not mount.get("readOnly")] == ["temporary"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    routes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    assert routes == ["/healthz", "/healthz", "/readyz"]
    assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS + 5  # and the wait before
    annotations = manifest("Deployment", "fastgda-service")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(given["port"])


def test_the_systemd_unit_starts_the_service_and_shuts_everything_else_out() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[method-assign,assignment]  # its names have capitals
    unit.read_string((DEPLOYMENTS / "systemd" / "fastgda.service").read_text())
    words = unit["Service"]["ExecStart"].split()
    given = (
        get_command(app)
        .get_command(None, "serve")
        .make_context(  # type: ignore[attr-defined]
            "serve", [*words[words.index("serve") + 1 :], "--workspace", "/var/lib/fastgda/workspace"]
        )
    )
    assert given.params["host"] == "127.0.0.1"
    assert unit["Service"]["User"] != "root"
    assert int(unit["Service"]["TimeoutStopSec"]) > DRAIN_SECONDS
    assert {unit["Service"][name] for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices")} == {"yes"}
    assert unit["Service"]["ProtectSystem"] == "strict"


@pytest.mark.parametrize("name", POOLS)
def test_prefect_takes_the_pool_template(name: str) -> None:
    template = pool(name)
    WorkPoolCreate(name="p", type=name, base_job_template=template)
    used = set(re.findall(r"{{\s*([\w.]+)\s*}}", json.dumps(template["job_configuration"])))
    declared = set(template["variables"]["properties"])
    # A worker adds `env` to what a template sets there by itself.
    merged = {"env"} if isinstance(template["job_configuration"]["env"], dict) else set()
    assert used | merged == declared
    Draft202012Validator.check_schema(template["variables"])
    defaults = {key: each["default"] for key, each in template["variables"]["properties"].items() if "default" in each}
    Draft202012Validator(template["variables"]).validate(defaults)


def test_a_process_job_sees_one_gpu_and_the_variables_of_its_deployment() -> None:
    made = job("process", gpu="3", env={"PREFECT_LOGGING_LEVEL": "DEBUG"})
    assert made["env"] == {"CUDA_VISIBLE_DEVICES": "3", "PREFECT_LOGGING_LEVEL": "DEBUG"}
    assert job("process")["env"] == {"CUDA_VISIBLE_DEVICES": "0"}


def test_a_docker_job_asks_docker_for_one_gpu_and_mounts_the_workspace() -> None:
    made = job("docker", gpu="1")
    assert (made["image"], made["volumes"]) == ("fastgda:latest", ["fastgda-workspace:/workspace"])
    host = HostConfig(version="1.41", device_requests=made["container_create_kwargs"]["device_requests"])
    (request,) = host["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"], request["Capabilities"]) == ("nvidia", ["1"], [["gpu"]])


def test_a_kubernetes_job_holds_one_gpu_of_the_kind_asked_for() -> None:
    made = job("kubernetes", gpu_product="NVIDIA-H100-80GB-HBM3", env={"A": "b"})
    pod = made["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "fastgda:latest"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 1}, "requests": {"cpu": "2", "memory": "8Gi"}}
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "fastgda-workspace"
    assert container["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/workspace"}]
    assert made["job_manifest"]["spec"]["ttlSecondsAfterFinished"] == 3600
    assert made["job_manifest"]["metadata"]["namespace"] == "fastgda"
    assert made["env"] == {"A": "b"}


def test_a_kubernetes_job_may_run_on_any_gpu_or_on_none() -> None:
    pod = job("kubernetes", gpus=0)["job_manifest"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 0}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOYMENTS / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def test_the_image_runs_as_the_user_that_the_manifests_name() -> None:
    users = [argument for word, argument in instructions() if word == "USER"]
    assert users == ["10001:10001"]
    assert pods()["fastgda-metrics"]["securityContext"]["runAsUser"] == 10001
    made = job("kubernetes")["job_manifest"]["spec"]["template"]["spec"]
    assert made["securityContext"]["runAsUser"] == made["securityContext"]["fsGroup"] == 10001


def test_the_image_takes_the_packages_and_nothing_else() -> None:
    sources = [word for name, argument in instructions() if name in ("COPY", "ADD") for word in argument.split()[:-1]]
    packages = {"fastgda_core", "storage_schemas", "tasks", "flows", "deployments"}
    files = {"requirements.lock", "requirements-dev.lock", "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    assert set(sources) == packages | files
    assert all((ROOT / source).exists() for source in sources)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {".git", ".venv"} <= set(ignored)
    assert not [source for source in sources if any(fnmatch(source, pattern) for pattern in ignored)]


def test_the_image_is_installed_as_the_makefile_does() -> None:
    installs = [argument for word, argument in instructions() if word == "RUN" and "pip install" in argument]
    torch = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert torch is not None
    assert installs[0].endswith(torch.group())
    assert "TORCH_INDEX_URL" in installs[0]
    locked, client = installs[1].split(" && ")
    assert "--no-deps" in installs[2] and locked.endswith("--no-deps -r requirements.lock")
    assert client.endswith("--constraint requirements-dev.lock s3fs")
    words = [word for word, _ in instructions()]
    assert ("ARG", "BASE=python:3.12-slim") in instructions()
    assert words.index("USER") < words.index("ENTRYPOINT")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the series, as Prometheus stores them."""
    text = exposition(Workspace(tmp_path_factory.mktemp("workspace")))
    families = text_string_to_metric_families(text)
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def dashboard(name: str = "grafana.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOYMENTS / name).read_text())
    return found


def of_the_service() -> set[str]:
    """Names of the series of the service, histograms by their own."""
    families = ServiceMetrics().registry.collect()
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def test_the_dashboard_of_the_service_shows_metrics_that_exist_and_all_of_them() -> None:
    found = dashboard("grafana-service.json")
    shown = set(re.findall(r"fastgda_\w+", json.dumps([panel["targets"] for panel in found["panels"]])))
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == of_the_service()
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    text = json.dumps(found)
    assert all(f"histogram_quantile({share}" in text for share in (0.5, 0.95, 0.99))
    choices = {variable["name"]: variable for variable in found["templating"]["list"]}
    (metric,) = re.findall(r"label_values\((\w+), job\)", choices["job"]["query"]["query"])
    assert metric in of_the_service()


def test_the_guide_of_the_service_explains_every_metric_and_every_limit() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text()
    assert sorted(re.findall(r"^\| `(fastgda_serve_\w+)`", guide, flags=re.MULTILINE)) == sorted(of_the_service())
    table = guide.split("## Limits")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == list(Limits.model_fields)


def test_the_dashboard_shows_metrics_that_exist_and_all_of_them(exported: set[str]) -> None:
    shown = set(re.findall(r"fastgda_\w+", json.dumps([panel["targets"] for panel in dashboard()["panels"]])))
    assert shown == exported
    choices = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert choices["datasource"]["type"] == "datasource"
    (metric,) = re.findall(r"label_values\((\w+), run\)", choices["run"]["query"]["query"])
    assert metric in exported


def test_the_dashboard_stacks_shards_and_asks_the_chosen_source() -> None:
    panels = {panel["title"]: panel for panel in dashboard()["panels"]}
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(panels)
    assert panels["Shards by state"]["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    sources = [panel["datasource"] for panel in panels.values()]
    sources += [target["datasource"] for panel in panels.values() for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_the_guide_explains_every_metric(exported: set[str]) -> None:
    guide = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(fastgda_\w+)`", guide, flags=re.MULTILINE)
    assert sorted(rows) == sorted(exported)

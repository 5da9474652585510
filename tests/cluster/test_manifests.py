"""The files in cluster/: safe pods, secrets by name alone, and command lines and settings that the jobs accept."""

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from shortv.plan import Plan
from shortv.spec import load_spec
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.serving import app
from shortv.workers.serving.spec import read_arguments
from shortv.workers.sweep.spec import SweepSpec

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
JOBS = ("rayjob-sweep.yaml", "rayjob-campaign.yaml")
MANIFESTS = (*JOBS, "rayservice-endpoint.yaml", "model-cache.yaml")
SECRETS = {"shortv-object-store", "shortv-api-keys", "shortv-hub-token"}
DOCS = (CLUSTER / "README.md").read_text() + (ROOT / "docs" / "cluster.md").read_text()
RAY_UP = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def cluster_of(manifest: Mapping[str, Any]) -> Any:
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"].get("rayClusterConfig")


def pods() -> Iterator[Any]:
    """The pods of all manifests: heads, workers and jobs."""
    for manifest in (manifest for name in MANIFESTS for manifest in objects(name)):
        cluster = cluster_of(manifest)
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if cluster else [manifest["spec"]]
        yield from (group["template"]["spec"] for group in groups if "template" in group)


def test_pods_have_no_privileges_and_mount_their_volumes() -> None:
    for pod in pods():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            # Numbers would be changed by YAML; GPUs and memory cannot be overcommitted.
            assert all(isinstance(value, str) for value in (*requests.values(), *limits.values()))
            assert [requests.get(name) for name in ("memory", "nvidia.com/gpu")] == [
                limits.get(name) for name in ("memory", "nvidia.com/gpu")
            ]
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes


def test_secrets_come_by_name() -> None:
    for pod in pods():
        for container in pod["containers"]:
            sources = [source["secretRef"]["name"] for source in container.get("envFrom", ())]
            for variable in container.get("env", ()):
                if re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"]) and not variable["name"].endswith("_PATH"):
                    sources.append(variable["valueFrom"]["secretKeyRef"]["name"])
            mounted = [volume["secret"]["secretName"] for volume in pod.get("volumes", ()) if "secret" in volume]
            assert {*sources, *mounted} <= SECRETS
    for name in JOBS:
        workers = json.dumps(cluster_of(objects(name)[0])["workerGroupSpecs"])
        assert "shortv-object-store" not in workers, "the driver alone reads and writes results"
    assert all(f"kubectl create secret generic {secret}" in DOCS for secret in SECRETS)


def test_ray_clusters_have_one_description() -> None:
    ray = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray=="))
    for cluster in (cluster_of(objects(name)[0]) for name in MANIFESTS[:3]):
        assert ray.split()[0] == f"ray=={cluster['rayVersion']}" and cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "drivers alone run on the head"
        groups = cluster["workerGroupSpecs"]
        assert len({group["groupName"] for group in groups}) == len(groups)
        assert any(group["replicas"] for group in groups)
        assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    sweep, campaign = (objects(name)[0]["spec"] for name in JOBS)
    assert sweep["rayClusterSpec"] == campaign["rayClusterSpec"]
    # Each retry of a RayJob builds a new cluster.
    assert sweep["backoffLimit"] == campaign["backoffLimit"] == 0


def test_images_are_those_of_the_release() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for pod in pods() for container in pod["containers"]} | {RAY_UP["docker"]["image"]}
    assert images == {f"shortv:{version}"} and f"-t shortv:{version} ." in DOCS


@pytest.mark.parametrize("path", [*sorted(CLUSTER.iterdir()), ROOT / ".dockerignore"], ids=lambda path: path.name)
def test_no_file_names_a_host_or_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"index-url|find-links|trusted-host|pyp[i]|/(work|home|root)/", text)
    assert set(re.findall(r"https?://([^/:\s\"]+)", text)) <= {"127.0.0.1"}
    assert not re.search(r"(?i)(password|secret|token|key)\w*\s*[=:]\s*['\"]?[A-Za-z0-9+/]{20,}", text)


def accept(line: str) -> None:
    """Parse a command line with the job's own parser; raises if the job would refuse it."""
    words = shlex.split(line)
    script = next(word for word in words if re.search(r"jobs/\w+\.py$", word))
    name = Path(script).stem
    command = importlib.import_module(f"jobs.{name}").main
    context = command.make_context(name, words[words.index(script) + 1 :])
    if name == "lc_sweep":
        given = {key: value for key, value in context.params.items() if key != "print_submission_id"}
        load_spec(SweepSpec, flags=given, defaults={"model": "bundled", "calibration": ("bundled",)})
    if name == "campaign":
        given = {key: value for key, value in context.params.items() if value not in (None, (), False)}
        given.pop("print_submission_id", None)
        load_spec(CampaignSpec, flags=given, config=given.pop("config", None), defaults={"models": ["bundled"]})


@pytest.mark.parametrize("name", JOBS)
def test_entrypoints_are_command_lines_of_the_jobs(name: str) -> None:
    entrypoint = objects(name)[0]["spec"]["entrypoint"]
    assert not re.search(r"[$`|&;<>]", entrypoint)
    words = shlex.split(entrypoint)
    assert words[1].startswith("/opt/shortv/jobs/") and "://" in words[words.index("--output-path") + 1]
    accept(entrypoint)


def test_documented_commands_are_command_lines_of_the_jobs() -> None:
    text = DOCS.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"    .*python \S*jobs/\w+\.py", line)]
    assert len(lines) >= 5
    for line in lines:
        accept(re.sub(r"^sweep=\"|\"$", "", line))


def test_the_serve_config_starts_this_endpoint() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(objects("rayservice-endpoint.yaml")[0]["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == f"{app.__name__}:{app.endpoint.__name__}"
    spec = read_arguments(application.args)
    assert spec.device != "auto" and spec.cpus_per_replica and spec.api_key_file
    [replica] = application.deployments
    [plan] = replica.user_config["plans"]
    published = Plan.load("llava-1.5-7b")
    assert replica.name == app.REPLICA
    assert Plan.from_json(json.dumps(plan)) == published and spec.model == published.model
    folder = str(Path(spec.api_key_file).parent)
    for group in [cluster_of(objects("rayservice-endpoint.yaml")[0])["headGroupSpec"]]:
        mounted = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert next(mount["readOnly"] for mount in mounted if mount["mountPath"] == folder) is True


def test_the_ray_up_file_is_valid() -> None:
    from ray.autoscaler._private import util
    from ray.scripts.scripts import start

    prepared: Any = util.prepare_config(dict(RAY_UP))  # type: ignore[no-untyped-call]
    util.validate_config(prepared)
    variables = {option.removeprefix("--env ") for option in RAY_UP["docker"]["run_options"]}
    assert "RAY_AUTH_MODE=token" in variables
    assert "env-file" not in " ".join(RAY_UP["docker"]["run_options"]), "credentials on the head alone"
    for kind in ("head", "worker"):
        line = prepared[f"{kind}_start_ray_commands"][-1].rpartition("; ")[2]
        parameters = start.make_context("start", shlex.split(line)[2:]).params
        assert (parameters["num_cpus"] == 0) == (kind == "head")
        assert kind == "worker" or parameters["dashboard_host"] == "127.0.0.1"

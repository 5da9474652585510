"""The files in cluster/: fields that KubeRay knows, secrets by name alone, and command lines that the jobs accept."""

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from shortv.errors import Refused, ShortVError
from shortv.plan import Plan
from shortv.spec import load_spec
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.serving.spec import read_arguments
from shortv.workers.sweep import driver
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.spec import SweepSpec, sweep_submission_id
from tests.cluster.rules import KINDS, RAY_VERSION, SECRETS, cluster_of, cross_problems, pods_of, problems
from tests.workers.fakes import FakeEngine, make_spec

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = ("rayjob-sweep.yaml", "rayjob-campaign.yaml", "rayservice-endpoint.yaml", "model-cache.yaml")
IMAGE_FOLDER = "/opt/shortv/"
README = (CLUSTER / "README.md").read_text() + (CLUSTER.parent / "docs" / "cluster.md").read_text()
RAY_UP = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


def objects(name: str) -> list[dict[str, Any]]:
    """The objects of a file, without the sharing that YAML anchors leave."""
    found: list[dict[str, Any]] = json.loads(json.dumps(list(yaml.safe_load_all((CLUSTER / name).read_text()))))
    return found


def found_in(manifest: Mapping[str, Any], where: str = "manifest") -> list[str]:
    own = list(problems(manifest, KINDS[manifest["kind"]], where))
    return own or list(cross_problems(manifest, where))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_keep_the_rules(name: str) -> None:
    assert [line for manifest in objects(name) for line in found_in(manifest, name)] == []


def test_every_file_is_tested() -> None:
    known = {*MANIFESTS, "serve.yaml", "ray-up.yaml", "Dockerfile", "README.md"}
    assert {path.name for path in CLUSTER.iterdir()} == known
    assert all(f"`{name}`" in README for name in known - {"README.md"})


HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"
PLAIN = {"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter2"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("spec.backoffLimit", 2, "not one of ['0']"),
        ("spec.submissionMode", "K8sJob", "not one of"),
        ("spec.retries", 1, "unknown key retries"),
        ("spec.entrypoint", None, "not of type str"),
        ("spec.rayClusterSpec.rayVersion", "2.59.0", f"not one of ['{RAY_VERSION}']"),
        ("spec.rayClusterSpec.authOptions.mode", "disabled", "not one of ['token']"),
        ("spec.rayClusterSpec.workerGroupSpecs", [], "not a list with something in it"),
        (f"{HEAD}.rayStartParams", {}, "the head has work"),
        (f"{HEAD}.rayStartParams", {"num-cpus": 0}, "not of type str"),
        (f"{HEAD}.template.spec.containers.0.envFrom.0.secretRef.name", "mine", "not one of"),
        (f"{HEAD}.template.spec.containers.0.env", [PLAIN], "AWS_SECRET_ACCESS_KEY in plain text"),
        (f"{HEAD}.template.spec.containers.0.volumeMounts.0.name", "other", "no volume of its pod"),
        (f"{HEAD}.template.spec.securityContext.runAsUser", 0, "runs as root"),
        (f"{WORKER}.replicas", 99, "outside of minReplicas and maxReplicas"),
        (f"{WORKER}.replicas", 0, "no worker group has replicas"),
        (f"{WORKER}.replicas", True, "not of type int"),
        (f"{WORKER}.groupName", "cpu", "two worker groups"),
        (f"{WORKER}.template.spec.containers.0.resources.limits.nvidia.com/gpu", "2", "requests 1 of nvidia.com/gpu"),
        (f"{WORKER}.template.spec.containers.0.resources.limits.cpu", 8, "not a quantity"),
    ],
)
def test_the_rules_find_what_is_wrong(path: str, value: object, reason: str) -> None:
    (manifest,) = objects("rayjob-sweep.yaml")
    place: Any = manifest
    *way, last = path.replace("nvidia.com", "nvidia com").split(".")
    for name in way:
        place = place[int(name) if name.isdigit() else name]
    place[last.replace("nvidia com", "nvidia.com")] = value
    assert reason in "; ".join(found_in(manifest))


def test_versions_and_images_are_the_same_everywhere() -> None:
    assert f"\nray=={RAY_VERSION} " in (ROOT / "requirements.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pods = [pod for name in MANIFESTS for manifest in objects(name) for pod in pods_of(manifest)]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    images.add(objects("ray-up.yaml")[0]["docker"]["image"])
    assert images == {f"shortv:{project['version']}"}
    assert f"-t shortv:{project['version']} ." in README


def test_jobs_share_one_description_of_the_cluster() -> None:
    sweep, campaign, endpoint = (cluster_of(objects(name)[0]) for name in MANIFESTS[:3])
    assert sweep == campaign
    assert sweep and endpoint
    assert [pod_sizes(sweep), sweep["authOptions"]] == [pod_sizes(endpoint), endpoint["authOptions"]]


def pod_sizes(cluster: Mapping[str, Any]) -> list[Any]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        [container["resources"] for container in group["template"]["spec"]["containers"]] + [group.get("replicas")]
        for group in groups
    ]


def test_secrets_are_documented_and_go_where_they_are_needed() -> None:
    users = {
        secret: {name for name in MANIFESTS if secret in (CLUSTER / name).read_text().partition("spec:")[2]}
        for secret in SECRETS
    }
    assert users == {
        "shortv-object-store": {"rayjob-sweep.yaml", "rayjob-campaign.yaml"},
        "shortv-api-keys": {"rayservice-endpoint.yaml"},
        "shortv-hub-token": {"model-cache.yaml"},
    }
    assert "env-file" not in " ".join(RAY_UP["docker"]["run_options"]), "on the head alone, as in Kubernetes"
    assert docker_options("head_run_options", "env-file") == ["/srv/shortv/object-store.env"]
    for secret in SECRETS:
        assert f"| `{secret}` |" in README and f"kubectl create secret generic {secret}" in README
    for name in MANIFESTS[:2]:
        cluster = cluster_of(objects(name)[0]) or {}
        assert "shortv-object-store" not in json.dumps(cluster["workerGroupSpecs"])


@pytest.mark.parametrize("path", [*sorted(CLUSTER.iterdir()), ROOT / ".dockerignore"], ids=lambda path: path.name)
def test_no_file_names_a_host_or_a_place_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"index-url|find-links|trusted-host|pyp[i]|/(work|home|root)/", text)
    assert set(re.findall(r"https?://([^/:\s\"]+)", text)) <= {"127.0.0.1"}
    assert not re.search(r"(?i)(password|secret|token|key)\w*\s*[=:]\s*['\"]?[A-Za-z0-9+/]{20,}", text)


@pytest.mark.parametrize("name", [*MANIFESTS, "serve.yaml", "ray-up.yaml"])
def test_values_to_change_are_marked_one_way(name: str) -> None:
    text = (CLUSTER / name).read_text()
    assert text.count("# CHANGE: ") >= 3
    assert re.findall(r"(?i)todo|fixme|change[ -]?me|<[a-z-]+>", text) == []


def accept(line: str) -> None:
    """Parse a command line with the job's own parser; raises where the job would refuse it."""
    words = shlex.split(line)
    script = next(word for word in words if re.search(r"jobs/\w+\.py$", word))
    assert words[words.index(script) - 1].endswith("python")
    name = re.sub(r".*jobs/(\w+)\.py", r"\1", script)
    assert (ROOT / "jobs" / f"{name}.py").is_file()
    command = importlib.import_module(f"jobs.{name}").main
    context = command.make_context(name, words[words.index(script) + 1 :])
    if name == "lc_sweep":
        given = {key: value for key, value in context.params.items() if key != "print_submission_id"}
        load_spec(SweepSpec, flags=given, defaults={"model": "bundled", "calibration": ("bundled",)})
    if name == "campaign":
        given = {key: value for key, value in context.params.items() if value not in (None, (), False)}
        given.pop("print_submission_id", None)
        load_spec(CampaignSpec, flags=given, config=given.pop("config", None), defaults={"models": ["bundled"]})


@pytest.mark.parametrize("name", MANIFESTS[:2])
def test_entrypoints_are_command_lines_of_the_jobs(name: str) -> None:
    entrypoint = objects(name)[0]["spec"]["entrypoint"]
    assert not re.search(r"[$`|&;<>]", entrypoint)
    assert shlex.split(entrypoint)[1].startswith(f"{IMAGE_FOLDER}jobs/")
    assert "://" in shlex.split(entrypoint)[shlex.split(entrypoint).index("--output-path") + 1]
    accept(entrypoint)


def test_what_the_jobs_refuse_is_found() -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        accept("python jobs/lc_sweep.py --output-path /x --modus all")
    with pytest.raises(Refused, match="--output-path is missing"):
        accept("python jobs/lc_sweep.py --modes all")
    with pytest.raises(click.UsageError, match="No such option"):
        accept("python jobs/serve.py --plans a")


def test_commands_of_the_readme() -> None:
    text = README.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r"    .*python \S*jobs/\w+\.py", line)]
    lines = [re.sub(r"^sweep=\"|\"$", "", line) for line in lines]
    assert len(lines) >= 5
    for line in lines:
        accept(line)


def serve_config() -> Any:
    return yaml.safe_load(objects("rayservice-endpoint.yaml")[0]["spec"]["serveConfigV2"])


def test_the_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config())
    (application,) = schema.applications
    module, _, builder = application.import_path.partition(":")
    assert (module, builder) == ("shortv.workers.serving.app", "endpoint")
    assert re.search(rf"^def {builder}\(", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.MULTILINE)
    arguments = read_arguments(application.args)
    assert arguments.device != "auto" and arguments.cpus_per_replica and arguments.api_key_file
    (replica,) = application.deployments
    app_text = (ROOT / "shortv/workers/serving/app.py").read_text()
    assert f'REPLICA = "{replica.name}"' in app_text
    (plan,) = replica.user_config["plans"]
    published = Plan.load("llava-1.5-7b")
    assert Plan.from_json(json.dumps(plan)) == published and arguments.model == published.model


def test_the_serve_config_is_the_same_with_and_without_kubernetes() -> None:
    assert serve_config() == yaml.safe_load((CLUSTER / "serve.yaml").read_text())


def test_the_api_keys_are_mounted_where_the_endpoint_reads_them() -> None:
    (manifest,) = objects("rayservice-endpoint.yaml")
    file = Path(serve_config()["applications"][0]["args"]["api_key_file"])
    for pod in pods_of(manifest):
        mounted = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted[str(file.parent)]["readOnly"] is True
    assert mounts("run_options")["/srv/shortv/api-keys"] == str(file.parent)
    assert f"--from-file={file.name}" in README


def test_what_the_cache_is_filled_with_is_what_the_jobs_use() -> None:
    script = objects("model-cache.yaml")[1]["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    sweep = shlex.split(objects("rayjob-sweep.yaml")[0]["spec"]["entrypoint"])
    campaign = shlex.split(objects("rayjob-campaign.yaml")[0]["spec"]["entrypoint"])
    tasks = [word.partition(":")[0] for flag, word in pairwise(sweep) if flag == "--calibration"]
    tasks += campaign[campaign.index("--tasks") + 1].split(",")
    assert all(f"'{task}:1'" in script for task in tasks)
    models = {sweep[sweep.index("--model") + 1], campaign[campaign.index("--model") + 1]}
    assert all(f"hf download {model}" in script for model in models)


def test_the_cache_of_machines_is_filled_by_one_command() -> None:
    (fill,) = re.findall(r"^    fill=\"(.+)\"$", README, re.MULTILINE)
    words = shlex.split(fill)
    assert words[:3] == ["docker", "run", "--rm"] and words[-1] == RAY_UP["docker"]["image"]
    assert "HF_HUB_OFFLINE=0" in words and "HF_TOKEN" in words
    source, _, target = words[words.index("--volume") + 1].partition(":")
    assert mounts("run_options")[source] == target == "/models"
    commands = re.findall(r"^    \$fill (.+)$", README, re.MULTILINE)
    (sweep,) = re.findall(r"sweep=\"(.+?)\"", README.replace("\\\n", " "))
    sweep = shlex.split(sweep)
    assert commands[0] == f"hf download {sweep[sweep.index('--model') + 1]}"
    assert f"'{sweep[sweep.index('--calibration') + 1].partition(':')[0]}:1'" in commands[1]
    code = shlex.split(commands[1])[-1]
    assert code.partition(";")[0] in (CLUSTER / "model-cache.yaml").read_text()


def test_what_ray_up_mounts_is_explained() -> None:
    explained = dict(re.findall(r"^\| `([\w.-]+)` \| (all|head)\b", README, re.MULTILINE))
    mounted = {name: "all" for name in mounts("run_options")}
    mounted |= {name: "head" for name in (*mounts("head_run_options"), *docker_options("head_run_options", "env-file"))}
    assert {f"/srv/shortv/{name}": where for name, where in explained.items()} == mounted


def docker_options(key: str, name: str) -> list[str]:
    """The values of one of Docker's options in ray-up.yaml."""
    found = [option.removeprefix("--").partition(" ")[::2] for option in RAY_UP["docker"].get(key, ())]
    return [value for option, value in found if option == name]


def mounts(key: str) -> dict[str, str]:
    """Places in the containers by those on the machines."""
    return dict(value.split(":")[:2] for value in docker_options(key, "volume"))


def test_an_id_that_a_refused_driver_used_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_spec(tmp_path, samples=4)
    ids = []

    def submit_again_and_die(*_: object) -> None:
        ids.append(sweep_submission_id(request))
        with pytest.raises(Refused, match="is in use by process"):
            run_sweep(request, engine=FakeEngine())
        raise ShortVError("the driver died")

    monkeypatch.setattr(driver, "run_units", submit_again_and_die)
    with pytest.raises(ShortVError, match="died"):
        run_sweep(request, engine=FakeEngine())
    assert [sweep_submission_id(request)] == ids
    assert "--submission-id $($sweep --print-submission-id)-b" in README and "already exists" in README


def test_the_ray_up_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start

    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    prepared: Callable[[Any], Any] = prepare_config
    config = prepared(config)
    validate_config(config)
    assert config["auth"]["ssh_private_key"], "in its container the head finds no key by itself"
    variables = dict(value.partition("=")[::2] for value in docker_options("run_options", "env"))
    assert variables["RAY_AUTH_MODE"] == "token" and variables["RAY_AUTH_TOKEN_PATH"] in mounts("run_options").values()
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    for kind in ("head", "worker"):
        line = config[f"{kind}_start_ray_commands"][-1].rpartition("; ")[2]
        context = start.make_context("start", shlex.split(line)[2:])
        assert (context.params["num_cpus"] == 0) == (kind == "head")
        if kind == "head":
            assert context.params["dashboard_host"] == "127.0.0.1"

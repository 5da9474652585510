"""What KubeRay and Kubernetes accept, as far as our manifests use it: a table per object, and the checks across them.

A rule is a type, a set of allowed values, a list of one rule for the items of a list, a dictionary of keys (required
where the name ends in `!`), or `Map` for free keys. Keys that are not in the table are refused: KubeRay would drop
them without a word.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

RAY_VERSION = "2.60.0"
SECRETS = {"shortv-object-store", "shortv-api-keys", "shortv-hub-token"}
"""As docs/cluster.md lists them."""


class Map(NamedTuple):
    """A mapping with keys of any name."""

    values: Any


class Quantity:
    """A Kubernetes quantity, written as text so that YAML cannot change it: "4", 16Gi."""


METADATA = {"name!": str, "labels": Map(str), "annotations": Map(str)}
SECURITY = {"allowPrivilegeEscalation!": {False}, "capabilities!": {"drop!": [{"ALL"}]}}
POD_SECURITY = {
    "runAsNonRoot!": {True},
    "runAsUser!": int,
    "runAsGroup": int,
    "fsGroup": int,
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "seccompProfile!": {"type!": {"RuntimeDefault"}},
}
SIZE = {"cpu!": Quantity, "memory!": Quantity, "nvidia.com/gpu": Quantity}
FROM_SECRET = {"name!": SECRETS, "key!": str, "optional": bool}
CONTAINER = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": {"IfNotPresent", "Always", "Never"},
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str, "valueFrom": {"secretKeyRef!": FROM_SECRET}}],
    "envFrom": [{"secretRef!": {"name!": SECRETS, "optional": bool}}],
    "securityContext!": SECURITY,
    "resources!": {"requests!": SIZE, "limits!": SIZE},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "secret": {"secretName!": SECRETS},
    "emptyDir": {"medium": str, "sizeLimit": Quantity},
}
TOLERATION = {
    "key": str,
    "operator": {"Exists", "Equal"},
    "value": str,
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
}
POD = {
    "securityContext!": POD_SECURITY,
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
    "tolerations": [TOLERATION],
    "nodeSelector": Map(str),
    "restartPolicy": {"Never", "OnFailure", "Always"},
    "serviceAccountName": str,
}
TEMPLATE = {"metadata": {"labels": Map(str), "annotations": Map(str)}, "spec!": POD}
HEAD_GROUP = {
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
    "enableIngress": bool,
    "rayStartParams!": Map(str),
    "template!": TEMPLATE,
}
WORKER_GROUP = {
    "groupName!": str,
    "replicas!": int,
    "minReplicas!": int,
    "maxReplicas!": int,
    "numOfHosts": int,
    "rayStartParams!": Map(str),
    "template!": TEMPLATE,
}
RAY_CLUSTER = {
    "rayVersion!": {RAY_VERSION},
    "authOptions!": {"mode!": {"token"}},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": Map(object),
    "gcsFaultToleranceOptions": Map(object),
    "headGroupSpec!": HEAD_GROUP,
    "workerGroupSpecs!": [WORKER_GROUP],
}
RAY_JOB = {
    "apiVersion!": {"ray.io/v1"},
    "kind!": {"RayJob"},
    "metadata!": METADATA,
    "spec!": {
        "entrypoint!": str,
        "runtimeEnvYAML": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"},
        # Each retry builds a new cluster.
        "backoffLimit!": {0},
        "submitterConfig": {"backoffLimit!": int},
        "submitterPodTemplate": TEMPLATE,
        "activeDeadlineSeconds": int,
        "preRunningDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "deletionStrategy": {"deletionRules!": [Map(object)]},
        "suspend": bool,
        "metadata": Map(str),
        "jobId": str,
        "rayClusterSpec!": RAY_CLUSTER,
    },
}
RAY_SERVICE = {
    "apiVersion!": {"ray.io/v1"},
    "kind!": {"RayService"},
    "metadata!": METADATA,
    "spec!": {
        "serveConfigV2!": str,
        "upgradeStrategy": {"type!": {"NewCluster", "None"}},
        "excludeHeadPodFromServeSvc": bool,
        "rayClusterDeletionDelaySeconds": int,
        "rayClusterConfig!": RAY_CLUSTER,
    },
}
CLAIM = {
    "apiVersion!": {"v1"},
    "kind!": {"PersistentVolumeClaim"},
    "metadata!": METADATA,
    "spec!": {
        "accessModes!": [{"ReadWriteMany"}],
        "storageClassName": str,
        "resources!": {"requests!": {"storage!": Quantity}},
    },
}
JOB = {
    "apiVersion!": {"batch/v1"},
    "kind!": {"Job"},
    "metadata!": METADATA,
    "spec!": {"backoffLimit": int, "ttlSecondsAfterFinished": int, "template!": TEMPLATE},
}
KINDS: Mapping[str, Any] = {"RayJob": RAY_JOB, "RayService": RAY_SERVICE, "PersistentVolumeClaim": CLAIM, "Job": JOB}


def problems(value: Any, rule: Any, where: str) -> Iterator[str]:
    """Yield a line for everything in a parsed manifest that its rule does not allow."""
    if isinstance(rule, dict | Map):
        if isinstance(value, dict):
            yield from _of_mapping(value, rule, where)
        else:
            yield f"{where} is {value!r}, not a mapping"
    elif isinstance(rule, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is {value!r}, not a list with something in it"
        else:
            for number, item in enumerate(value):
                yield from problems(item, rule[0], f"{where}[{number}]")
    elif isinstance(rule, set):
        if not any(value == allowed and type(value) is type(allowed) for allowed in rule):
            yield f"{where} is {value!r}, not one of {sorted(map(str, rule))}"
    elif rule is Quantity:
        if not isinstance(value, str) or not value.rstrip("GiMm").isdigit():
            yield f"{where} is {value!r}, not a quantity as text"
    elif not isinstance(value, rule) or (rule is int and (isinstance(value, bool) or value < 0)):
        yield f"{where} is {value!r}, not of type {rule.__name__}"


def _of_mapping(value: Mapping[str, Any], rule: Any, where: str) -> Iterator[str]:
    if isinstance(rule, Map):
        for key, item in value.items():
            yield from problems(item, rule.values, f"{where}.{key}")
        return
    known = {key.removesuffix("!"): item for key, item in rule.items()}
    for key in rule:
        if key.endswith("!") and key.removesuffix("!") not in value:
            yield f"{where} lacks {key.removesuffix('!')}"
    for key, item in value.items():
        if key in known:
            yield from problems(item, known[key], f"{where}.{key}")
        else:
            yield f"{where} has the unknown key {key}"


def cluster_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The Ray cluster that a manifest describes, if it does."""
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"].get("rayClusterConfig")


def pods_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every pod of a manifest: head and workers, or a job's."""
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if cluster else [manifest["spec"]]
    return [group["template"]["spec"] for group in groups if "template" in group]


def cross_problems(manifest: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield a line for everything that is allowed by itself and wrong beside the rest; the manifest keeps its rule."""
    cluster = cluster_of(manifest)
    if cluster:
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f'{where}: the head has work; give it num-cpus: "0"'
        groups = cluster["workerGroupSpecs"]
        if len({group["groupName"] for group in groups}) != len(groups):
            yield f"{where}: two worker groups have one name"
        if not any(group["replicas"] for group in groups):
            yield f"{where}: no worker group has replicas"
        for group in groups:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{where}: {group['groupName']} has replicas outside of minReplicas and maxReplicas"
    for pod in pods_of(manifest):
        yield from _of_pod(pod, where)


def _of_pod(pod: Mapping[str, Any], where: str) -> Iterator[str]:
    if pod["securityContext"]["runAsUser"] == 0:
        yield f"{where}: a pod runs as root"
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    for container in pod["containers"]:
        name = f"{where}: {container['name']}"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        for resource in ("memory", "nvidia.com/gpu"):
            if requests.get(resource) != limits.get(resource):
                yield f"{name} requests {requests.get(resource)} of {resource}, limited to {limits.get(resource)}"
        mounts = [mount["name"] for mount in container.get("volumeMounts", ())]
        if set(mounts) - volumes:
            yield f"{name} mounts {set(mounts) - volumes}, which is no volume of its pod"
        for variable in container.get("env", ()):
            if "value" in variable and any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
                yield f"{name} has the secret {variable['name']} in plain text"

"""The cluster files, offline: Ray's validation, EC2's own request model, the fields KubeRay
knows.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import botocore.session
import jsonschema
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from raytvb.experiment.parsing import load_experiment, parse_experiment

Fields: TypeAlias = dict[str, Any]
"""A YAML object."""

Documents: TypeAlias = dict[str, Fields]
"""The objects of a file by their kind."""

Misspelling: TypeAlias = Callable[[Fields], object]

CLUSTER = Path(__file__).parent.parent / "cluster"
RAY_MINOR = ".".join(ray.__version__.split(".")[:2])
RAY_JOB = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "preRunningDeadlineSeconds",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
RAY_CLUSTER = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
}
HEAD_GROUP = {
    "enableIngress",
    "headService",
    "labels",
    "rayStartParams",
    "resources",
    "serviceType",
    "template",
}
WORKER_GROUP = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "suspend",
    "template",
}
AUTOSCALER = {
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "upscalingMode",
    "version",
    "volumeMounts",
}
POD = {
    "affinity",
    "containers",
    "initContainers",
    "nodeSelector",
    "priorityClassName",
    "restartPolicy",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
}
CONTAINER = {
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "name",
    "ports",
    "resources",
    "securityContext",
    "volumeMounts",
}


@pytest.fixture
def aws() -> Fields:
    fields: Fields = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    return fields


@pytest.fixture
def kuberay() -> Documents:
    return {d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())}


@pytest.fixture(scope="module")
def run_instances() -> Any:
    """The parameters of EC2's RunInstances, as botocore ships them."""
    model = botocore.session.Session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def launcher_accepts(config: Fields) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def ec2_report(node_config: Fields, shape: Any) -> str:
    """EC2's complaints about a node. Ray fills in SubnetIds, SecurityGroupIds and the counts."""
    found = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    report: str = found.generate_report()
    return report


def unknown_fields(job: Fields) -> list[str]:
    """Fields of a RayJob that neither KubeRay 1.6 nor (for the parts used here) Kubernetes
    knows.
    """
    spec = job["spec"]
    cluster = spec.get("rayClusterSpec", {})
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    levels = [
        ("job", spec, RAY_JOB),
        ("cluster", cluster, RAY_CLUSTER),
        ("head", groups[0], HEAD_GROUP),
        ("autoscaler", cluster.get("autoscalerOptions", {}), AUTOSCALER),
    ]
    levels += [("worker", group, WORKER_GROUP) for group in groups[1:]]
    for group in groups:
        pod = group["template"]["spec"]
        levels += [("pod", pod, POD), *(("container", c, CONTAINER) for c in pod["containers"])]
    return [
        f"{where}.{name}" for where, given, known in levels for name in sorted(given.keys() - known)
    ]


def test_aws_is_accepted_by_the_launcher(aws: Fields) -> None:
    launcher_accepts(aws)


@pytest.mark.parametrize(
    "misspell",
    [
        lambda c: c.update(idle_timeout_minuts=5),
        lambda c: c["docker"].update(imag="rayproject/ray"),
        lambda c: c["available_node_types"]["head"].update(resource={"CPU": 0}),
        lambda c: c["available_node_types"]["gpu_l4"].update(max_worker=1),
        lambda c: c["available_node_types"]["head"].update(resources={"CPU": "0"}),
    ],
)
def test_aws_with_a_misspelt_key_or_wrong_type_is_refused(
    aws: Fields, misspell: Misspelling
) -> None:
    misspell(aws)
    with pytest.raises(jsonschema.ValidationError):
        launcher_accepts(aws)


def test_aws_node_types(aws: Fields) -> None:
    types = aws["available_node_types"]
    head = types.pop(aws["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types
    for name, worker in types.items():
        assert worker["min_workers"] == 0, name
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot", name
        assert worker["node_config"]["IamInstanceProfile"]["Name"], name
        assert "GPU" not in worker["resources"], "Ray looks it up from the instance type"
    assert aws["provider"]["cache_stopped_nodes"] is False
    assert 0 < aws["idle_timeout_minutes"] <= 10


def test_aws_nodes_are_accepted_by_ec2(aws: Fields, run_instances: Any) -> None:
    for name, node in aws["available_node_types"].items():
        assert not ec2_report(node["node_config"], run_instances), name
        assert node["node_config"]["InstanceType"] in run_instances.members["InstanceType"].enum
        market = node["node_config"].get("InstanceMarketOptions", {"MarketType": "spot"})[
            "MarketType"
        ]
        assert market in run_instances.members["InstanceMarketOptions"].members["MarketType"].enum


@pytest.mark.parametrize(
    "misspelt, words",
    [
        ({"InstanceTyp": "g5.xlarge"}, "InstanceTyp"),
        ({"InstanceMarketOptions": {"MarketTypes": "spot"}}, "MarketTypes"),
        ({"IamInstanceProfile": {"name": "x"}}, "IamInstanceProfile"),
        (
            {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]},
            "VolumeSize",
        ),
    ],
)
def test_a_misspelt_node_config_is_refused_by_ec2(
    aws: Fields, run_instances: Any, misspelt: Fields, words: str
) -> None:
    node = {**aws["available_node_types"]["gpu_l4"]["node_config"], **misspelt}
    assert words in ec2_report(node, run_instances)


def test_aws_runs_this_ray_with_a_token_on_every_node(aws: Fields) -> None:
    assert all(
        aws["docker"][image].startswith(f"rayproject/ray:{RAY_MINOR}.")
        for image in ("image", "head_image")
    )
    assert any(
        "/home/ray/raytvb" in command and f"=={RAY_MINOR}." in command
        for command in aws["setup_commands"]
    )
    assert "/home/ray/raytvb" in aws["file_mounts"]
    for where in ("head", "worker"):
        start = aws[f"{where}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN_PATH=/home/ray/auth_token" in start
    assert aws["file_mounts"]["/home/ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in aws["head_start_ray_commands"][-1]


def test_kuberay_job(kuberay: Documents) -> None:
    assert set(kuberay) == {"ServiceAccount", "ConfigMap", "RayJob"}
    job = kuberay["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert not unknown_fields(job)
    spec = job["spec"]
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    assert spec["shutdownAfterJobFinishes"] is True
    assert all(
        isinstance(spec[k], int) and spec[k] > 0
        for k in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
    )
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)


@pytest.mark.parametrize(
    "misspell",
    [
        lambda s: s.update(entryPoint="python"),
        lambda s: s["rayClusterSpec"].update(enableAutoscaling=True),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=0),
        lambda s: s["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(
            volumeMount=[]
        ),
    ],
)
def test_a_misspelt_kuberay_field_is_seen(kuberay: Documents, misspell: Misspelling) -> None:
    misspell(kuberay["RayJob"]["spec"])
    assert len(unknown_fields(kuberay["RayJob"])) == 1


def test_kuberay_pods(kuberay: Documents) -> None:
    cluster = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"].startswith(f"{RAY_MINOR}.")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert pod["serviceAccountName"] == kuberay["ServiceAccount"]["metadata"]["name"]
        for container in pod["containers"]:
            assert f":{RAY_MINOR}." in container["image"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    for worker in groups[1:]:
        assert worker["minReplicas"] == 0 < worker["maxReplicas"]
        resources = worker["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] >= 1


def test_kuberay_mounts_the_experiment_that_the_entrypoint_names(kuberay: Documents) -> None:
    pod = kuberay["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volumes = {v["name"]: v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
    (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] in volumes)
    assert volumes[mount["name"]] == kuberay["ConfigMap"]["metadata"]["name"]
    (file,) = kuberay["ConfigMap"]["data"]
    assert (
        kuberay["RayJob"]["spec"]["entrypoint"]
        == f"python -m raytvb run {mount['mountPath']}/{file}"
    )
    assert (
        kuberay["ConfigMap"]["data"][file].rstrip()
        == (CLUSTER / "experiment.yaml").read_text().rstrip()
    )


def test_the_example_experiment_is_valid_and_made_for_a_cluster(kuberay: Documents) -> None:
    experiment = load_experiment(CLUSTER / "experiment.yaml")
    assert experiment == parse_experiment(
        yaml.safe_load(kuberay["ConfigMap"]["data"]["experiment.yaml"])
    )
    assert len(experiment.tasks) == 8
    assert experiment.store.startswith("s3://")
    assert experiment.resources.wait_s > 0
    assert experiment.resources.gpus_per_task > 0

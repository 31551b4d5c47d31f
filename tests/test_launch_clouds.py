"""What goes to Kubernetes and AWS Batch fits their own schemas and says what a training job needs; the image holds what it must."""

import fnmatch
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from kubernetes.client import ApiClient
from tiny_run import REPOSITORY
from torchx.schedulers import aws_batch_scheduler
from torchx.specs import AppDef, macros

from launch import components, job, scripts, slurm, volcano
from mbcnet_rec.cli import build_parser

MOUNTS = ["type=volume", "src=storage", "dst=/storage"]  # torchx takes the parts


def described(shape: str = "2x8", **more: object) -> AppDef:
    given = {"cpu": 96, "gpu": 8, "memMB": 800_000, "max_retries": 3, "mounts": MOUNTS, **more}
    return components.train("--set=train.out=/storage/run", config="/storage/run.toml", j=shape, **given)


def request(scheduler, app: AppDef, **cfg: object):
    """What a scheduler would send."""
    return scheduler.submit_dryrun(app, scheduler.run_opts().resolve(cfg)).request


def as_kubernetes_has_it(kind: str, given: Mapping) -> None:
    """An object of Kubernetes' own API: nothing that is wanted is missing, nothing is there that the API does not know."""
    client = ApiClient()
    made = client.deserialize(SimpleNamespace(data=json.dumps(given)), kind)
    assert client.sanitize_for_serialization(made) == given


def pod_of_volcano(task: Mapping) -> dict:
    pod = ApiClient().sanitize_for_serialization(task["template"])
    as_kubernetes_has_it("V1Pod", pod)
    return pod["spec"]


def stops_and_goes_on(pod: Mapping) -> None:
    """What both ways to Kubernetes have in common."""
    (container,) = pod["containers"]
    # the job starts pods again; a container alone would miss its partners
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == job.GRACE_SECONDS >= 120
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001
    }  # fmt: skip
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shared = volumes[places["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory" and shared["sizeLimit"] == "200000Mi"
    assert volumes[places["/storage"]]["persistentVolumeClaim"]["claimName"] == "storage"
    assert {"name": "PYTHONSAFEPATH", "value": "1"} in container["env"]


def test_torchx_on_kubernetes():
    resource = request(volcano.create_scheduler("test"), described(), queue="default").resource
    assert (resource["apiVersion"], resource["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    tasks = resource["spec"]["tasks"]
    assert len(tasks) == 2 and resource["spec"]["maxRetry"] == 3
    for task in tasks:
        pod = pod_of_volcano(task)
        stops_and_goes_on(pod)
        command = pod["containers"][0]["command"][-1]
        assert "--nnodes 2 --nproc-per-node 8" in command and "--resume" in command
        assert task["policies"][:2] == [{"exitCode": code, "action": "AbortJob"} for code in (2, 76)]
        assert {"event": "PodEvicted", "action": "RestartJob"} in task["policies"]
    for task, first in zip(tasks, ("TORCHX_RANK0_HOST", "VC_TRAIN_0_HOSTS"), strict=True):
        assert f"${{{first}:=localhost}}:29500" in pod_of_volcano(task)["containers"][0]["command"][-1]


def test_an_elastic_job_on_kubernetes_needs_its_least_hosts_only():
    resource = request(volcano.create_scheduler("test"), described("1:2x8"), queue="default").resource
    assert [task["minAvailable"] for task in resource["spec"]["tasks"]] == [1, 0]


def test_jobs_of_others_pass_through_untouched():
    app = described()
    app.roles[0].metadata.clear()
    task = request(volcano.create_scheduler("test"), app, queue="default").resource["spec"]["tasks"][0]
    assert "terminationGracePeriodSeconds" not in pod_of_volcano(task)
    assert "signal" not in request(slurm.create_scheduler("test"), app, time="60").materialize()


@pytest.mark.parametrize("shape", ["1x8", "2x8", "1:2x8"])
def test_plain_kubernetes(shape):
    size = {"shape": job.parse_shape(shape), "cpu": 96, "gpu": 8, "memory_mb": 800_000}
    described = job.Job("train", ("--config", "run.toml"), name="My run!", **size)
    service, made = yaml.safe_load_all(scripts.kubernetes_yaml(described))
    as_kubernetes_has_it("V1Service", service)
    as_kubernetes_has_it("V1Job", made)
    pod = made["spec"]["template"]["spec"]
    stops_and_goes_on(pod)
    hosts, spec = described.shape.hosts, made["spec"]
    assert spec["completions"] == spec["parallelism"] == hosts and spec["completionMode"] == "Indexed"
    first, *rules = spec["podFailurePolicy"]["rules"]
    assert first["action"] == "FailJob" and first["onExitCodes"]["values"] == [2, 76]
    assert [rule["action"] for rule in rules] == ["Ignore"] * 2  # a drained node and a stop with a checkpoint
    # the pods find the first one by its name in the headless service
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] == "my-run"
    assert service["spec"]["selector"] == {"job-name": made["metadata"]["name"]}
    args = pod["containers"][0]["args"]
    endpoint = args[args.index("--rdzv-endpoint") + 1]
    assert endpoint == ("my-run-0.my-run:29500" if hosts > 1 else "localhost:0") and args[-1] == "--resume"


@pytest.mark.parametrize("hosts", [1, 5])
def test_a_ray_job_on_kubernetes(hosts):
    """By hand what KubeRay's definition of a RayJob (ray.io/v1, of August 2026) requires and knows; the pods by Kubernetes' own API."""
    size = {"shape": job.Shape(hosts, hosts, 1), "cpu": 96, "gpu": 8, "memory_mb": 800_000}
    words = ("fit", "s.toml", "logs/ds=*", "-o", "fitted", "--engine", "ray")
    made = yaml.safe_load(scripts.ray_job(job.Job("schema", words, name="My fit", **size)))
    assert made["apiVersion"] == "ray.io/v1" and made["kind"] == "RayJob" and made["metadata"]["name"] == "my-fit"
    spec = made["spec"]
    assert set(spec) == {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 0
    first, c, line = shlex.split(spec["entrypoint"])  # KubeRay puts it into a shell line of its own
    assert (first, c) == ("sh", "-c") and shlex.split(line)[:4] == ["cd", "/storage", "&&", "exec"]
    assert shlex.split(line)[4:] == ["mbcnet", "schema", *words]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"headGroupSpec", "workerGroupSpecs"} - ({"workerGroupSpecs"} if hosts == 1 else set())
    workers = cluster.get("workerGroupSpecs", [])
    assert [each["groupName"] for each in workers] == ["workers"] * (hosts > 1)
    assert all(each[key] == hosts - 1 for each in workers for key in ("replicas", "minReplicas", "maxReplicas"))
    for group in (cluster["headGroupSpec"], *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        as_kubernetes_has_it("V1PodTemplateSpec", group["template"])
        stops_and_goes_on({"restartPolicy": "Never", **group["template"]["spec"]})  # KubeRay sets the policy


def test_the_scorer_on_kubernetes():
    """Not root, probes that are served, a stop that lets requests end, and options that the command knows and accepts."""
    deployment, service = yaml.safe_load_all((REPOSITORY / "examples/serve.yaml").read_text())
    as_kubernetes_has_it("V1Deployment", deployment)
    as_kubernetes_has_it("V1Service", service)
    template = deployment["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == job.USER_ID
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    app = (REPOSITORY / "mbcnet_rec/server/app.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'Route("{container[probe]["httpGet"]["path"]}"' in app and container[probe]["httpGet"]["port"] == "http"
    words, (pause, seconds) = container["args"], container["lifecycle"]["preStop"]["exec"]["command"]
    given = build_parser().parse_args(words[1:])
    assert words[:2] == ["mbcnet", "serve"] and given.host == "0.0.0.0" and pause == "sleep"
    assert given.drain_seconds + int(seconds) < pod["terminationGracePeriodSeconds"]
    assert given.port == container["ports"][0]["containerPort"]
    labels = template["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    token, probed = container["env"][0], {mount["mountPath"] for mount in container["volumeMounts"]}
    assert token["name"] == "MBCNET_SCORE_TOKEN" and probed == {"/models", "/tmp"}


def test_aws_batch():
    made = request(aws_batch_scheduler.create_scheduler("test"), described(), queue="gpus", image_repo="repo")
    model = get_session().get_service_model("batch")
    sent = {"jobName": made.name, "jobQueue": made.queue, "jobDefinition": made.name}
    for operation, given in (("RegisterJobDefinition", made.job_def), ("SubmitJob", sent)):
        report = ParamValidator().validate(given, model.operation_model(operation).input_shape)
        assert not report.has_errors(), report.generate_report()
    assert made.job_def["retryStrategy"]["attempts"] == 3
    nodes = made.job_def["nodeProperties"]
    assert nodes["numNodes"] == 2
    container = nodes["nodeRangeProperties"][0]["container"]
    wanted = {each["type"]: each["value"] for each in container["resourceRequirements"]}
    assert wanted == {"VCPU": "96", "GPU": "8", "MEMORY": "800000"}
    assert container["linuxParameters"]["sharedMemorySize"] > 64
    assert container["mountPoints"][0]["containerPath"] == "/storage" and not container["privileged"]
    assert "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS" in container["command"][-1]


def test_slurm_gives_every_core_and_warns_before_the_time_limit():
    def script(**cfg: object) -> str:
        return request(slurm.create_scheduler("test"), described(), **cfg).materialize()

    day = script(time="1-0")
    assert day.count("--signal=TERM@300") == 2 and day.count("--open-mode=append") == 2
    assert "--signal" not in script(time="10") and "--signal" not in script()
    assert day.partition("\nsrun ")[2].count("--cpus-per-task=96") == 2
    assert macros.app_id not in day


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("30:10", 30), ("2:30:00", 150), ("1-0", 1440), ("1-2:30", 1590), ("1-2:30:10", 1590)],
)
def test_slurms_time_limits(text, minutes):
    assert slurm.time_limit_minutes(text) == minutes


DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def copied() -> list[str]:
    """What the Dockerfile takes from the repository."""
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_the_image_is_pinned_and_not_roots():
    stages = re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE)
    bases = [base for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if base not in stages]
    assert bases and all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", base) for base in bases), "a version"
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)[-1] == f"{job.USER_ID}:{job.USER_ID}"
    assert f"--uid {job.USER_ID} --gid {job.USER_ID}" in DOCKERFILE


def test_the_image_holds_every_package_and_nothing_is_ignored_on_the_way():
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} <= set(copied())
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    ignored = [rule for rule in rules if rule[0] != "!" and rule != "*"]
    for name in copied():
        assert (REPOSITORY / name).exists() and f"!{name}" in rules, name
        assert not any(fnmatch.fnmatch(name, rule) for rule in ignored), name

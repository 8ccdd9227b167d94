"""The cluster files against what will read them: schemas, versions, names. A typo must fail here, not on a cluster."""

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from commandline import ROOT
from crds import crd_schema

from cluster.submit import DRIVER_CPUS

DEPLOY = ROOT / "cluster" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
IMAGE = f"escala:{PROJECT['project']['version']}"
MANIFESTS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


def load(name: str) -> Any:
    return yaml.safe_load(text(name))


def cluster_of(kind: str) -> Any:
    """The Ray cluster that a manifest describes."""
    spec = load(f"kuberay/{MANIFESTS[kind]}")["spec"]
    return spec if kind == "RayCluster" else spec["rayClusterSpec"]


def pods(kind: str) -> list[Any]:
    cluster = cluster_of(kind)
    return [one["template"]["spec"] for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


# --- Kubernetes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MANIFESTS)
def schema(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """KubeRay's schema of a kind, and the manifest of that kind."""
    kind = request.param
    folder = Path(os.environ.get("ESCALA_KUBERAY", ROOT.parent / "shared" / "reference" / "kuberay")).resolve()
    path = folder / f"ray.io_{kind.lower()}s.crd.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not here: {path} (set ESCALA_KUBERAY to their folder)")
    return crd_schema(path), load(f"kuberay/{MANIFESTS[kind]}")


def test_the_manifests_meet_kuberays_own_schemas(schema: tuple[Any, Any]) -> None:
    jsonschema.Draft202012Validator(schema[0]).validate(schema[1])


def _typo(manifest: Any) -> None:
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    spec["autoScalerOptions"] = spec.pop("autoscalerOptions")


def _deep_typo(manifest: Any) -> None:
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _wrong_mode(manifest: Any) -> None:
    manifest["spec"].get("rayClusterSpec", manifest["spec"])["authOptions"]["mode"] = "tokens"


def _wrong_type(manifest: Any) -> None:
    manifest["spec"].get("rayClusterSpec", manifest["spec"])["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


@pytest.mark.parametrize("spoil", [_typo, _deep_typo, _wrong_mode, _wrong_type])
def test_the_schemas_refuse_what_kubernetes_would_silently_drop(
    schema: tuple[Any, Any], spoil: Callable[[Any], None]
) -> None:
    manifest = copy.deepcopy(schema[1])
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema[0]).validate(manifest)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_strangers_are_kept_off_and_pods_are_not_root(kind: str) -> None:
    assert cluster_of(kind)["authOptions"] == {"mode": "token"}
    for pod in pods(kind):
        assert pod["securityContext"]["runAsNonRoot"] is True
        user = re.search(r"useradd --uid (\d+)", text("image/Dockerfile"))
        assert user is not None
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user[1])
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not [one for one in container.get("env", ()) if "PASSWORD" in one["name"]]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_every_pod_mounts_the_one_store_and_gpus_are_limited(kind: str) -> None:
    claim = load("kuberay/store.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(kind):
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
            assert mounted["store"] == "/store"
            assert set(mounted) == set(volumes)
            assert container["resources"]["limits"] == container["resources"]["requests"]
    _, worker = pods(kind)
    assert int(worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_head_is_kept_off_nodes_that_may_be_taken_away(kind: str) -> None:
    head, _ = pods(kind)
    required = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert {one["operator"] for one in term["matchExpressions"]} == {"NotIn"}, "holds where no node has the label"


def test_a_job_drives_from_a_head_that_trains_nothing_and_comes_back_when_the_head_is_lost() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    assert cluster_of("RayJob")["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["entrypointNumCpus"] == 0
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_every_head_to_which_one_submits_has_room_for_a_driver() -> None:
    standing = [float(cluster_of("RayCluster")["headGroupSpec"]["rayStartParams"]["num-cpus"])]
    for cloud in ("aws", "gcp"):
        cluster = load(f"{cloud}/cluster.yaml")
        known = cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"]
        started = re.search(r"ray start --head .*--num-cpus=(\d+)", " ".join(cluster["head_start_ray_commands"]))
        assert started is not None
        assert int(started[1]) == known, "the launcher and Ray count the same"
        standing.append(known)
    assert all(cpus >= DRIVER_CPUS for cpus in standing)


def test_the_entrypoint_is_a_command_that_escala_takes() -> None:
    import typer.main

    import escala

    words = load("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["escala", "run"]
    command = typer.main.get_command(escala.app).commands["run"]  # type: ignore[attr-defined]
    taken = command.make_context("run", words[2:]).params
    assert taken["address"] == "auto"
    assert taken["store"] == Path("/store")
    assert taken["study"] == "/study/study.yaml"


def test_the_log_that_people_are_told_to_follow_is_that_of_the_job_and_all_of_it() -> None:
    """By its labels kubectl would show the last ten lines. KubeRay gives the submitter's job the name of the RayJob."""
    name = load("kuberay/rayjob.yaml")["metadata"]["name"]
    assert re.findall(r"kubectl logs \S+ \S+", text("kuberay/README.md")) == [f"kubectl logs -f job/{name}"]


# --- versions and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_manifests_name_the_pinned_ray_and_this_version(kind: str) -> None:
    assert cluster_of(kind)["rayVersion"] == PINNED["ray"]
    for pod in pods(kind):
        assert {one["image"].rsplit("/", 1)[1] for one in pod["containers"]} == {IMAGE}


@pytest.mark.parametrize("name", ["image/Dockerfile", "mlflow/Dockerfile"])
def test_what_an_image_pins_is_what_was_tested_and_what_it_copies_is_let_in(name: str) -> None:
    content = text(name)
    python = re.findall(r"FROM python:(\d+\.\d+)-slim", content)
    assert python
    least = tuple(map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split(".")))
    assert all(tuple(map(int, one.split("."))) >= least for one in python)
    pins = re.findall(r"([a-z0-9-]+)(?:\[[a-z,]+\])?==([0-9.]+)", content)
    assert pins
    assert all(PINNED[package] == version for package, version in pins)
    assert re.search(r"^USER 1000:1000$", content, re.MULTILINE), "not root"
    let_in = {line[1:] for line in text(f"{name}.dockerignore").splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", content, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    copied |= set(re.findall(r"type=bind,source=([^,\s]+)", content))
    assert copied == let_in
    assert all((ROOT / one).exists() for one in let_in)


def test_cpu_builds_of_torch_are_asked_for_beside_pypi_which_has_what_they_need() -> None:
    for name in ("image/Dockerfile", "image/README.md"):
        assert re.findall(r'TORCH_OPTIONS="(--\S+) ', text(name)) == ["--extra-index-url"], name


def test_extras_named_in_the_files_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for found in re.findall(r"(?:escala|\.)\[([a-z,]+)\]", path.read_text()):
                assert set(found.split(",")) <= extras, path


def test_each_folder_says_what_it_is_for() -> None:
    assert all((one / "README.md").exists() for one in (DEPLOY, *DEPLOY.iterdir()) if one.is_dir())


def test_files_that_the_readmes_name_are_there() -> None:
    for path in DEPLOY.rglob("README.md"):
        for target in re.findall(r"`(\.\./[^`]+)`|`(tests/[^`]+\.py)`", path.read_text()):
            near, far = target
            assert (path.parent / near if near else ROOT / far).exists(), (path, target)


# --- MLflow --------------------------------------------------------------------------------------------------------


def test_the_compose_file_opens_nothing_but_the_proxy_and_holds_no_password() -> None:
    composed = load("mlflow/compose.yaml")
    services = composed["services"]
    assert {name for name, one in services.items() if "ports" in one} == {"proxy"}
    assert composed["networks"]["inside"] == {"internal": True}
    for name, one in services.items():
        assert re.search(r":\d+\.\d+(\.\d+)?(-[a-z]+)?$", one["image"]), "no tag that moves from version to version"
        assert one["mem_limit"], "a leak ends one service, not the machine"
        assert set(one["networks"]) <= set(composed["networks"])
        assert set(one.get("depends_on", ())) <= set(services)
        for volume in one["volumes"]:
            source = volume.split(":")[0]
            assert source in composed["volumes"] or (DEPLOY / "mlflow" / source).exists(), (name, source)
        for key, value in one["environment"].items():
            if "PASSWORD" in key or "SECRET" in key:
                assert value.startswith("${"), f"{name}: {key} comes from the file of --env-file"
    assert services["mlflow"]["image"] == f"escala-mlflow:{PROJECT['project']['version']}"
    build = services["mlflow"]["build"]
    context = (DEPLOY / "mlflow" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).exists()


def test_the_compose_file_gives_the_server_all_that_its_script_asks_for() -> None:
    asked = set(re.findall(r"\b(?:MLFLOW|ESCALA_MLFLOW)_[A-Z_]+", text("mlflow/serve.sh").partition("; do")[0]))
    given = set(load("mlflow/compose.yaml")["services"]["mlflow"]["environment"])
    needed = {one for one in asked if one in text("mlflow/serve.sh").partition("for name in")[2].partition("; do")[0]}
    assert needed <= given
    readme = text("mlflow/README.md")
    assert all(one in readme for one in needed)


def test_the_proxy_and_the_server_meet() -> None:
    services = load("mlflow/compose.yaml")["services"]
    port = services["mlflow"]["environment"]["ESCALA_MLFLOW_LISTEN"].rpartition(":")[2]
    assert services["proxy"]["environment"]["ESCALA_MLFLOW_UPSTREAM"] == f"mlflow:{port}"
    assert "{$ESCALA_MLFLOW_UPSTREAM:127.0.0.1:5000}" in text("mlflow/Caddyfile")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": ""}, "MLFLOW_AUTH_ADMIN_PASSWORD is not set"),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://a:b@c/d"}, "must name its driver"),
    ],
)
def test_the_server_script_refuses_half_a_setting(changes: dict[str, str], sentence: str, tmp_path: Path) -> None:
    needed = {
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://a:b@c/d",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "x",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x",
        "ESCALA_MLFLOW_NAME": "x",
        "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path),
    }
    command = ["bash", str(DEPLOY / "mlflow" / "serve.sh")]
    ended = subprocess.run(command, env=os.environ | needed | changes, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert sentence in ended.stderr


# --- Slurm and the clouds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", path], check=True)


def test_the_slurm_script_gives_as_long_as_slurm_does() -> None:
    script = text("slurm/escala.sbatch")
    signal = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", script, re.MULTILINE)
    grace = re.search(r"^GRACE_SECONDS=(\d+)", script, re.MULTILINE)
    assert signal is not None
    assert grace is not None
    assert signal[1] == grace[1]
    assert re.search(r"^#SBATCH --requeue$", script, re.MULTILINE)
    assert re.search(r"^#SBATCH --mem=0$", script, re.MULTILINE), "--exclusive gives no memory"


def played_slurm(folder: Path, *options: str, **does: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The Slurm script with Slurm's programs played by these lines of shell: its end, and how they were called."""
    played = {"escala": "", "ray": "", "squeue": "", "srun": "", "scontrol": "[ $1 = requeue ] || echo here", **does}
    for name, words in played.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{words}\n')
        (folder / name).chmod(0o755)
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7-played", "SLURM_JOB_NODELIST": "here"}
    command = ["bash", str(DEPLOY / "slurm" / "escala.sbatch"), "study.yaml", str(folder / "store"), *options]
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    return ended, (folder / "calls").read_text()


@pytest.mark.parametrize("typed", [("--checkpoint-seconds", "7200"), ("--checkpoint-seconds=7200.5", "--workers=2")])
def test_a_checkpoint_interval_that_was_typed_is_what_the_time_limit_is_held_against(
    tmp_path: Path, typed: tuple[str, ...]
) -> None:
    ended, calls = played_slurm(tmp_path, *typed, squeue="echo 1:00:00")
    assert ended.returncode == 2
    assert "the time limit of 1:00:00 is shorter than a checkpoint interval (7200" in ended.stderr
    assert "srun" not in calls


def test_a_checkpoint_interval_that_is_no_number_is_refused_in_words(tmp_path: Path) -> None:
    ended, calls = played_slurm(tmp_path, "--checkpoint-seconds", "five", squeue="echo 1:00:00")
    assert ended.returncode == 2
    assert "error: 'five' is no checkpoint interval. Write seconds" in ended.stderr
    assert "srun" not in calls


def test_nodes_that_start_slowly_are_waited_for_for_minutes(tmp_path: Path) -> None:
    _, calls = played_slurm(tmp_path, squeue="echo 1-00:00:00", srun=f"env >> {tmp_path}/calls")
    waits = dict(re.findall(r"^RAY_(SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT|py_gcs_connect_timeout_s)=(\d+)$", calls, re.M))
    assert set(waits.values()) == {"300"}
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    known = [Path(found.origin).parent / name for name in ("scripts/symmetric_run.py", "includes/ray_config.pxd")]
    assert len(waits) == len([name for name in waits for path in known if name in path.read_text()]) == 2


@pytest.mark.parametrize("told", [None, "a-token-of-the-user"])
def test_a_jobs_token_is_the_users_where_there_is_one_and_else_a_new_one(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if told:
        monkeypatch.setenv("RAY_AUTH_TOKEN", told)
    _, calls = played_slurm(tmp_path, squeue="echo 1-00:00:00", srun=f"env >> {tmp_path}/calls")
    (token,) = set(re.findall(r"^RAY_AUTH_TOKEN=(.*)$", calls, re.M))
    assert token == told if told else re.fullmatch("[0-9a-f]{64}", token)


@pytest.mark.parametrize(("signal", "code", "requeued"), [("USR1", 0, True), ("TERM", 143, False)])
def test_a_job_that_is_signalled_before_its_run_begins_begins_none_and_is_requeued_for_its_limit_alone(
    signal: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    """The first step, which makes a folder, is what the signal comes during."""
    ended, calls = played_slurm(tmp_path, squeue="echo 1-00:00:00", srun=f"kill -{signal} $PPID")
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ("scontrol requeue 7-played" in calls) is requeued
    assert ("time limit" in ended.stdout) is requeued
    assert "symmetric-run" not in calls


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_launchers_files_meet_rays_schema_with_spot_workers_and_a_token(cloud: str) -> None:
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    launcher = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = load(f"{cloud}/cluster.yaml")
    jsonschema.validate(cluster, launcher)
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert "spot" not in str(head)
    assert "preemptible" not in str(head)
    assert all("spot" in str(one) or "'preemptible': True" in str(one) for one in types.values())
    assert all(one["resources"]["GPU"] for one in types.values())
    assert cluster["docker"]["image"].endswith(f"/{IMAGE}")
    started = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in started if "ray start" in line)
    assert any("--dashboard-host=127.0.0.1" in line for line in started)
    assert set(cluster["file_mounts"]) == {"~/.ray/auth_token", "~/.mlflow/credentials"}, "no job brings a secret"


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_launcher_adds_no_commands_of_its_own_to_the_files(cloud: str) -> None:
    """Its defaults install other versions, as a user who may not write the image's environment."""
    from ray.autoscaler._private.util import fillout_defaults

    cluster = load(f"{cloud}/cluster.yaml")
    filled = fillout_defaults(copy.deepcopy(cluster))
    commands = {name: lines for name, lines in filled.items() if name.endswith("_commands") and lines}
    assert commands == {name: lines for name, lines in cluster.items() if name.endswith("_commands") and lines}


@pytest.mark.parametrize(("cloud", "library"), [("aws", "boto3"), ("gcp", "google-api-python-client")])
def test_what_the_launcher_calls_is_on_the_users_machine_and_in_the_image(cloud: str, library: str) -> None:
    (requirement,) = PROJECT["project"]["optional-dependencies"][cloud]
    assert re.split("[<>=]", requirement)[0] == library
    assert library in PINNED
    assert f"'.[cluster,{cloud}]'" in text(f"{cloud}/README.md")
    image = text("image/Dockerfile")
    (extras,) = re.findall(r"\.\[([a-z,]+)\]", image)
    assert cloud in extras.split(","), "the head starts workers itself"
    assert {"rsync", "openssh-client"} <= set(image.split())
    assert "'PATH=/opt/escala/bin:$PATH' > /etc/profile.d/" in image, "its shells are login shells"
    user = re.search(r"useradd .*/bin/bash ([a-z]+) ", image)
    assert user is not None
    assert f"HOME=/home/{user[1]}" in image.split(), "where ~ of file_mounts is"


def test_what_people_are_told_to_install_is_the_checkout_and_not_a_registrys_package_of_that_name() -> None:
    modules = [path for package in ("sweeps", "cluster", "analysis") for path in (ROOT / package).glob("*.py")]
    pages = [*DEPLOY.rglob("README.md"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for path in (*pages, ROOT / "tests" / "sharedmlflow.py", *modules):
        assert not re.search(r"pip install[^\n]* '?escala\b", path.read_text()), path

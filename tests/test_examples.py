"""The cluster examples hold together: shell and YAML are sound, and torchrun and miaobi know every flag in them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from miaobi.command_line import split, take_config
from miaobi.config import RunConfig
from miaobi.errors import UserError
from miaobi.seeds import TRAIN
from miaobi.settings import load_config

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples" / "slurm.sh"
PYTORCHJOB = ROOT / "examples" / "pytorchjob.yaml"
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SLURM_VARIABLES = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "nodes[0]": "node1"}


def expanded(command: str) -> list[str]:
    """The words of a command, continuation lines joined, SLURM's variables filled in."""
    command = re.sub(r"\\\n\s*", " ", command)
    command = re.sub(r"\$\{?([\w\[\]]+)\}?", lambda found: SLURM_VARIABLES[found[1]], command)
    return shlex.split(command, comments=True)


def check_torchrun(words: list[str]) -> tuple[object, RunConfig]:
    """torchrun's own parser and miaobi's configuration accept the words of `torchrun ... -m miaobi train ...`."""
    assert words[0] == "torchrun"
    given = get_args_parser().parse_args(words[1:])
    assert (given.module, given.training_script) == (True, "miaobi")
    verb, *rest = given.training_script_args
    assert verb == "train"
    line = split(RunConfig, TRAIN, rest)
    return given, load_config(take_config(line.words), line.given)[0]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def slurm_command(arguments: str) -> list[str]:
    found = re.search(r"srun (?:--\S+ )*(torchrun .*?) &$", SLURM.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return expanded(found[1].replace('"$@"', arguments))


def test_slurm_starts_what_torchrun_and_miaobi_understand():
    defaults = re.search(r"set -- (configs/.*)", SLURM.read_text(encoding="utf-8"))[1]
    torchrun, cfg = check_torchrun(slurm_command(defaults))
    assert (torchrun.nnodes, torchrun.nproc_per_node) == ("1:2", "gpu")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "node1:29500")
    assert torchrun.max_restarts > 0
    for ranks in (8, 16):  # with one node or two
        assert cfg.train.global_batch % ranks == 0


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit):
        check_torchrun(expanded("torchrun --nnode_count=2 -m miaobi train configs/demo.yaml"))
    with pytest.raises(UserError, match="unknown key"):
        check_torchrun(expanded("torchrun --nnodes=2 -m miaobi train configs/demo.yaml --batchsize=3"))


def test_slurm_asks_for_what_it_uses():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SLURM.read_text(encoding="utf-8"), re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("2", "1")  # one torchrun a node
    assert {"requeue", "time", "gpus-per-node"} <= set(asked)
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])
    directives = re.search(r"\A(?:#.*\n)+", SLURM.read_text(encoding="utf-8"))[0]
    assert directives.count("#SBATCH") == len(asked)  # sbatch stops looking at the first command


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_slurm_is_sound_shell():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, str(SLURM)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


FAKES = {
    "srun": """\
        echo "srun $*" >> log
        trap 'echo saved >> log; exit 1' TERM
        echo $$ > step
        for i in $(seq 100); do [ -e finish ] && exit 0; sleep 0.1; done
    """,
    "scontrol": """\
        if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> log; fi
    """,
    "scancel": """\
        echo "scancel $*" >> log
        kill -TERM "$(cat step)"
    """,
}


def start_job(place: Path) -> subprocess.Popen:
    """The script under a SLURM that only writes down what it is told."""
    (place / "bin").mkdir()
    for name, body in FAKES.items():
        (place / "bin" / name).write_text("#!/bin/bash\n" + textwrap.dedent(body), encoding="utf-8")
        (place / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(SLURM), "my.yaml"], cwd=place, env=environment)
    while not (place / "step").exists() or not (place / "step").read_text(encoding="utf-8"):
        assert job.poll() is None
        time.sleep(0.02)
    return job


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_slurms_time_limit_saves_and_queues_the_job_again(tmp_path):
    job = start_job(tmp_path)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@180 has SLURM send it
    job.wait(20)
    started, *rest = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert started.endswith("--rdzv-endpoint=node1:29500 --rdzv-id=7 --max-restarts=3 -m miaobi train my.yaml")
    assert rest == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


@pytest.mark.skipif(os.name != "posix", reason="bash")
def test_a_finished_slurm_job_is_not_queued_again(tmp_path):
    job = start_job(tmp_path)
    (tmp_path / "finish").touch()
    assert job.wait(20) == 0
    assert len((tmp_path / "log").read_text(encoding="utf-8").splitlines()) == 1


def test_pytorchjob():
    job = YAML(typ="safe").load(PYTORCHJOB)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, (kind, worker) = job["spec"], *job["spec"]["pytorchReplicaSpecs"].items()
    assert kind == "Worker"  # an elastic job has no Master
    elastic = spec["elasticPolicy"]
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])  # a string, by its schema
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for variable in container["env"]:
        assert isinstance(variable["value"], str)
    seconds = {variable["name"]: variable["value"] for variable in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(seconds) < pod["terminationGracePeriodSeconds"]
    _, cfg = check_torchrun(container["command"])
    for nodes in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        assert cfg.train.global_batch % (nodes * int(spec["nprocPerNode"])) == 0
    assert cfg.train.out_dir.startswith("/shared/")


def test_the_pages_commands_are_understood(tmp_path, monkeypatch):
    for name in ("train300M_ddp", "train90M_ddp"):  # small-gpt's own, of which miaobi ships none
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / f"{name}.yaml").write_text("n_layer: 2\nn_head: 2\nn_embd: 32\n", encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    shown = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "torchrun" in block]
    commands = [line for block in shown for line in re.sub(r"\\\n\s*", " ", block).splitlines() if "torchrun" in line]
    assert len(commands) >= 6
    for command in commands:
        words = expanded(command)
        check_torchrun(words[next(i for i, word in enumerate(words) if word == "torchrun") :])

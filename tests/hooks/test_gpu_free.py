"""gpu-free.sh against stand-ins for nvidia-smi."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine.real import ROOT, wait_until
from tests.harness.waiting import PATIENCE

SCRIPT = ROOT / "hooks" / "gpu-free.sh"


@pytest.fixture(params=["sh", "bash"])
def check(request, tmp_path):
    """Return a function that runs the script with an nvidia-smi made of these lines, or with none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("timeout", "sleep", "cat", "rm", "awk", "cksum", "tr", request.param):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(nvidia_smi: str | None, **env: str) -> subprocess.CompletedProcess[str]:
        if nvidia_smi is not None:
            program = tools / "nvidia-smi"
            program.write_text(f"#!{shutil.which('sh')}\n{nvidia_smi}\n")
            program.chmod(0o755)
        return subprocess.run(
            [tools / request.param, SCRIPT],
            cwd=tmp_path,
            env={"PATH": str(tools), **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return run


def figures(*gpus: tuple[int, int], apps: str = "") -> str:
    rows = "".join(f"echo '{index}, {free}, {used}';" for index, (free, used) in enumerate(gpus))
    return f'case "$*" in *compute-apps*) echo "{apps}";; *) {rows} esac'


def test_without_nvidia_smi_it_says_so_and_succeeds(check):
    done = check(None)
    assert done.returncode == 0
    assert "no nvidia-smi" in done.stdout


def test_little_in_use_is_free(check):
    assert check(figures((23_000, 300))).returncode == 0


def test_too_much_in_use_fails_and_names_who(check):
    done = check(figures((4_000, 20_000), apps="4711, 19900, llama-server"))
    assert done.returncode == 1
    assert "GPU 0: 20000 MiB in use, 1024 allowed" in done.stderr
    assert "4711, 19900, llama-server" in done.stderr


def test_one_gpu_of_several_is_enough_to_fail(check):
    done = check(figures((23_000, 1), (4_000, 20_000)))
    assert done.returncode == 1
    assert "GPU 1" in done.stderr


def test_min_free_counts_instead_of_max_used(check):
    assert check(figures((18_000, 6_000)), MIN_FREE="18000").returncode == 0
    done = check(figures((17_999, 6_000)), MIN_FREE="18000")
    assert done.returncode == 1
    assert "17999 MiB free, 18000 needed" in done.stderr


def test_max_used_may_be_raised(check):
    assert check(figures((18_000, 6_000)), MAX_USED="6000").returncode == 0


@pytest.mark.parametrize("variable", ["GPUS", "CUDA_VISIBLE_DEVICES"])
def test_it_looks_at_the_gpus_it_is_told_to(check, variable):
    script = 'echo "$*" >>asked; echo "1, 23000, 1"'
    assert check(script, **{variable: "1"}).returncode == 0
    done = check('cat asked; echo "1, 1, 23000"', **{variable: "1"})
    assert "--id=1" in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'driver/library version mismatch'; exit 18", "version mismatch"),
        ("exit 0", "names no GPU"),
        ("echo '0, [N/A], [N/A]'", "no figures"),
    ],
)
def test_what_cannot_be_told_is_no_success(check, script, said):
    done = check(script)
    assert done.returncode == 2
    assert said in done.stderr


def test_an_nvidia_smi_that_hangs_is_given_up(check):
    done = check('case "$*" in *compute-apps*) ;; *) exec sleep 60;; esac', DEADLINE="0.3")
    assert done.returncode == 2
    assert "did not answer" in done.stderr


def test_by_hand_it_can_wait(check):
    script = "if [ -f again ]; then echo '0, 23000, 1'; else echo '0, 4000, 20000'; : >again; fi"
    assert check(script, WAIT="5").returncode == 0


@pytest.mark.parametrize("said", ["No devices were found", "No devices were found.; exit 6"])
def test_no_gpu_is_said_and_succeeds(check, said):
    done = check(f"echo {said}")
    assert done.returncode == 0
    assert "no GPU here" in done.stdout


def test_a_driver_that_knows_no_mig_is_asked_without(check):
    old = """case "$*" in
    *mig.mode*) echo 'Field "mig.mode.current" is not a valid field to query.'; exit 2;;
    *) echo '0, 23000, 1';;
    esac"""
    assert check(old).returncode == 0


def test_its_own_processes_have_to_be_small_or_gone(check):
    gpu = figures((60_000, 20_000), apps="4711, 19900\n4712, 300")
    allowed = {"MIN_FREE": "18000"}
    assert check(gpu, **allowed).returncode == 0
    assert check(gpu, **allowed, PIDS="4712,9").returncode == 0
    done = check(gpu, **allowed, PIDS="4712, 4711")
    assert done.returncode == 1
    assert "process 4711 of the engine holds 19900 MiB, 1024 allowed" in done.stderr
    assert check(gpu, **allowed, PIDS="4711", OWN_MAX="20000").returncode == 0


def test_the_engines_processes_are_those_of_its_pid_file(check, tmp_path):
    known = {"PID_DIR": str(tmp_path), "LLMUX_MODEL": "org/m", "LLMUX_PORT": "8001", "MAX_USED": "30000"}
    become = ["sh", ROOT / "hooks" / "process.sh", "become-engine", "sleep", "600"]
    with subprocess.Popen(become, env=os.environ | known, start_new_session=True) as engine:
        try:
            wait_until(lambda: any(tmp_path.glob("*.pid")), what="the pid file")
            gpu = figures((60_000, 20_000), apps=f"{engine.pid}, 5000")
            done = check(gpu, **known)
            assert f"process {engine.pid} of the engine holds 5000 MiB" in done.stderr
            assert done.returncode == 1
            assert check(gpu, **known, ALIAS="qwen").returncode == 1  # as most scripts name it
            assert (
                check(gpu, **{**known, "ALIAS": "org/m", "LLMUX_MODEL": "m"}).returncode == 1
            )  # as llama-cpp.sh does
            assert check(gpu, **{**known, "LLMUX_PORT": "8002"}).returncode == 0
        finally:
            engine.kill()


def test_a_worker_of_the_engine_with_a_group_of_its_own_is_the_engines(check, tmp_path):
    known = {"PID_DIR": str(tmp_path), "LLMUX_MODEL": "m", "LLMUX_PORT": "8001", "MAX_USED": "30000"}
    with subprocess.Popen(["sh", "-c", "timeout 600 sleep 600 & wait"], start_new_session=True) as engine:
        children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children")
        wait_until(children.read_text, what="the worker")
        worker = int(children.read_text())
        try:
            wait_until(lambda: os.getpgid(worker) == worker, what="the worker's group")
            (tmp_path / "m-8001.pid").write_text(f"{engine.pid} 1-boot ready\n")
            done = check(figures((60_000, 20_000), apps=f"{worker}, 5000"), **known)
            assert f"process {worker} of the engine holds 5000 MiB" in done.stderr
            assert done.returncode == 1
        finally:
            os.killpg(worker, signal.SIGTERM)  # and so the engine ends


def test_processes_without_figures_are_left_to_the_gpus_own(check):
    assert check(figures((23_000, 300), apps="4711, [N/A]"), PIDS="4711").returncode == 0


LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-77777777)"""

REPORT = """GPU 00000000:07:00.0
    MIG Mode
        Current                           : Enabled
    MIG Device
        Index                             : 0
        FB Memory Usage
            Total                         : 20096 MiB
            Used                          : 11 MiB
            Free                          : 20085 MiB
        BAR1 Memory Usage
            Used                          : 7777 MiB
            Free                          : 0 MiB
    MIG Device
        Index                             : 1
        FB Memory Usage
            Total                         : 20096 MiB
            Used                          : 15000 MiB
            Free                          : 5096 MiB
    FB Memory Usage
        Total                             : 40537 MiB
        Used                              : 15011 MiB
        Free                              : 25526 MiB
    Processes
        Process ID                        : 4711
            Used GPU Memory               : 15000 MiB
GPU 00000000:0F:00.0
    FB Memory Usage
        Used                              : 4 MiB
        Free                              : 40000 MiB"""

DIVIDED = f"""case "$*" in
*compute-apps*) echo '4711, 15000, python3';;
-L) cat <<'END'
{LISTED}
END
;;
--query) cat <<'END'
{REPORT}
END
;;
*--id=1*) echo '1, 40000, 4, Disabled';;
*) echo '0, 25526, 15011, Enabled'; echo '1, 40000, 4, Disabled';;
esac"""


@pytest.mark.parametrize(
    ("gpus", "free"),
    [("MIG-aaaa", True), ("MIG-bbbb", False), ("MIG-aaaa,MIG-bbbb", False), ("1", True), ("", False)],
)
def test_mig_devices_are_looked_at_each_for_itself(check, gpus, free):
    done = check(DIVIDED, CUDA_VISIBLE_DEVICES=gpus)
    assert done.returncode == (0 if free else 1), done.stderr
    assert free or "GPU 0.1: 15000 MiB in use, 1024 allowed" in done.stderr


def test_a_mig_device_that_is_not_there_cannot_be_told(check):
    done = check(DIVIDED, GPUS="MIG-cccc")
    assert done.returncode == 2
    assert "knows none of these: MIG-cccc" in done.stderr


def test_the_script_is_where_the_readme_says():
    assert os.access(SCRIPT, os.X_OK)

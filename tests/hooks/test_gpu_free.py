"""gpu-free.sh against stand-ins for nvidia-smi."""

import os
import shutil
import subprocess

import pytest

from tests.engine.real import ROOT

SCRIPT = ROOT / "hooks" / "gpu-free.sh"


@pytest.fixture(params=["sh", "bash"])
def check(request, tmp_path):
    """Return a function that runs the script with an nvidia-smi made of these lines, or with none."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("timeout", "sleep", "cat", "rm", request.param):
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
            timeout=30,
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


def test_the_script_is_where_the_readme_says():
    assert os.access(SCRIPT, os.X_OK)

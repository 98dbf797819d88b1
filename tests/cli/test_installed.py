"""The installed command as a process of its own, from another folder: Python imports what lies in its own first."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import attnreuse

ONE = ("--images", "1", "--steps", "4")


def run(*args, cwd, **env):
    return subprocess.run(
        ["attnreuse", *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )


@pytest.mark.parametrize("start", [["attnreuse"], [sys.executable, "-m", "attnreuse"]])
def test_the_installed_command_tells_its_version(start, tmp_path):
    """From another folder: python imports what lies in its own first."""
    made = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert made.stdout.strip() == f"attnreuse {attnreuse.__version__}"
    wrong = subprocess.run([*start, "plan", "--layers", "[x]"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "'[x]' matches none of the 20 layers" in wrong.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("plan", "--memory-budget", "4X", "--no-measure"), "error: --memory-budget must be bytes or like '4GiB'"),
        (("plan", "--policy", "nofile"), "error: --policy: no such policy file: nofile (a hub name is like user/name)"),
        (("sample", "--model", "./play", "--prompt", "a"), "error: --model: no such folder: ./play"),
        (("sample", "--out", "s.jpg"), "error: --out must end in .png, got s.jpg"),
        (("sample", "--out", "no/s.png"), "error: --out: no such folder: "),
        (("search", "--workers", "2"), "error: --workers is for --engine ray, not for local"),
        (("search", "--method", "exhaustive", "--patience", "2"), "error: --patience is for --method phast, not for"),
        (("search", "--cache", "no/c.jsonl"), "error: --cache: no such folder: "),
        (("analyze", "--steps", "3", "--reuse", "9"), "error: --reuse must be between 0 and 2 for 3 steps, got 9"),
        (("analyze", "--schedules", "1"), "error: --schedules must be at least 3, or 0 for no rank, got 1"),
    ],
)
def test_bad_input_is_one_clear_line(args, said, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_json_comes_alone_and_third_parties_say_nothing(tmp_path):
    args = ("--scheduler", "DDIMScheduler", "--memory-budget", "4G", "--no-measure", "--json")
    planned = run("plan", *ONE[2:], *args, cwd=tmp_path)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert json.loads(planned.stdout)["policy"]["steps"] == 4
    args = ("--steps", 2, "--reuse", 1, "--prompt", "a red circle on gray", "--json")
    sampled = run("sample", *args, cwd=tmp_path)
    assert (sampled.returncode, sampled.stderr) == (0, "")
    assert json.loads(sampled.stdout)["policy"]["reuse"] == ".R"


def test_a_floor_that_is_not_reached_is_said_and_scores_come_from_the_cache(tmp_path):
    args = ("search", "--method", "exhaustive", "--images", 1, "--steps", 3, "--reuse", 1, "--cache", "c.jsonl")
    result = run(*args, "--out", "p.json", "--floor", 500, cwd=tmp_path)
    assert result.returncode == 2
    assert re.search(r"none of 2 schedules reaches --floor 500: the best has PSNR \d+\.\d+ dB", result.stderr)
    assert not (tmp_path / "p.json").exists()
    again = run(*args, "--out", "p.json", cwd=tmp_path)
    assert again.returncode == 0
    assert "PSNR, dB" in again.stdout
    assert "0 schedules judged now, 2 from the cache." in again.stdout
    assert (tmp_path / "p.json").exists()


@pytest.mark.parametrize("args", [("sample", "--model", "user/x", "--prompt", "a"), ("plan", "--policy", "user/x")])
def test_without_a_network_the_cause_is_named_at_once(args, tmp_path):
    begin = time.monotonic()
    result = run(*args, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # the discard port, where nobody listens
    assert result.returncode == 2
    assert "user/x is neither a file nor a folder here, and the hub cannot be reached: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert time.monotonic() - begin < 20


def test_files_of_other_things_and_policies_of_other_steps_are_named(tmp_path):
    (tmp_path / "notes.jsonl").write_text("notes\n")
    result = run("search", *ONE, "--reuse", 1, "--cache", "notes.jsonl", cwd=tmp_path)
    assert (result.returncode, (tmp_path / "notes.jsonl").read_text()) == (2, "notes\n")
    assert "notes.jsonl is not a file of scores (line 1)" in result.stderr
    attnreuse.hurry(6, 2).save(tmp_path / "six.json")
    result = run("plan", *ONE[2:], "--policy", "six.json", "--no-measure", cwd=tmp_path)
    assert result.returncode == 2
    assert "--policy six.json" in result.stderr


def test_a_missing_extra_is_named_with_its_remedy(tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    result = run("compare", *ONE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "absent"))
    assert result.returncode == 2
    assert result.stderr.strip() == "error: plots need matplotlib: pip install 'attnreuse[eval,plot]'"


def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(tmp_path):
    args = ("search", "--images", "1", "--steps", "6", "--reuse", "3", "--cache", "c.jsonl", "--out", "p.json")
    scores, deadline = tmp_path / "c.jsonl", time.monotonic() + 120
    # As a terminal starts it: a suite in the background hands on that ^C is ignored.
    start = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        ["attnreuse", *args], stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=start
    ) as going:
        while not (scores.exists() and scores.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        going.send_signal(signal.SIGINT)
        said = going.stderr.read()
    kept = len(scores.read_text().splitlines())
    assert going.returncode == 130, said
    assert "stopped: the scores so far are in c.jsonl; run the same command again to go on" in said
    assert not (tmp_path / "p.json").exists()
    assert json.loads(run(*args, "--json", cwd=tmp_path).stdout)["evaluations"] >= kept > 0

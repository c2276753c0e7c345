"""A hundred seeded kills: runner, kernel, at a chosen rename, two runners at once. What comes out
is what an undisturbed run gives."""

import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from toy_project import ToyProject, kernels

KILLS_EACH, SCENARIOS, TOGETHER = 10, 10, 2
WAYS = ("runner", "kernel", "rename", "two runners", "both runners")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, machine_json):
    project = ToyProject(tmp_path_factory.mktemp("undisturbed") / "project", machine_json)
    project.run()
    return project.artifacts()


def wait_for_kernel(project, runner, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until and runner.poll() is None:
        if found := kernels(project):
            return found[0]
        time.sleep(0.02)


def end(process):
    process.kill()
    process.communicate()


def kill_once(project, way, rng):
    """Start the run and kill it in one of the ways, at a seeded moment. A run that ends first was
    quicker than its killer."""
    if way == "rename":
        p = project.start(
            "run", "--profile", "toy", DIE_AT=f"{rng.randint(1, 40)}{rng.choice(['', '+'])}"
        )
        p.communicate(timeout=120)
        return p.returncode == -signal.SIGKILL
    p = project.start("run", "--profile", "toy")
    if way == "kernel":
        kernel = wait_for_kernel(project, p, 10)
        time.sleep(rng.uniform(0, 1.2))
        if kernel and kernel.is_running():
            try:
                kernel.kill()
            except psutil.Error:
                pass
        out, err = p.communicate(timeout=120)
        assert p.returncode in (0, 5), (p.returncode, out, err)
        if p.returncode == 5:
            assert "kernel died" in err and "Traceback" not in err, err
        return p.returncode == 5
    if way == "runner":
        time.sleep(rng.uniform(0.2, 4))
        end(p)
        return p.returncode == -signal.SIGKILL
    q = project.start("run", "--profile", "toy")
    time.sleep(rng.uniform(0.5, 4))
    end(p)
    if way == "both runners":
        time.sleep(rng.uniform(0, 0.5))
        end(q)
        return -signal.SIGKILL in (p.returncode, q.returncode)
    out, err = q.communicate(
        timeout=120
    )  # the other one waits for the lock, or works, and finishes
    assert q.returncode == 0, (out, err)
    return p.returncode == -signal.SIGKILL


def only_whole_entries(project):
    "Every entry under a final name is whole, whatever happened."
    from llmeco_nb.runner.store import Store

    store = Store(project.runs)
    for entry in project.entries():
        if entry.suffix in (".partial", ".page"):
            continue
        assert (entry / "manifest.json").is_file(), entry
        assert store.damage(entry) == [], entry


def killed_again_and_again(seed, project, undisturbed):
    """One scenario: ten attempts to kill, then a run that ends as if there had been none. Returns
    how many of them killed."""
    rng, kills = random.Random(seed), 0
    ways = [WAYS[(seed + k) % len(WAYS)] for k in range(KILLS_EACH)]
    for way in ways:
        kills += kill_once(project, way, rng)
        only_whole_entries(project)
        deadline = time.monotonic() + 2
        while (left := kernels(project)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"{way}: an orphan kernel is still at work: {left}"
        if (
            rng.random() < 0.4
        ):  # come back to an unfinished project half of the time, to a fresh one otherwise
            subprocess.run(
                ["rm", "-rf", *map(str, project.runs.glob("toy-*")), str(project.runs / "store")],
                check=True,
            )
    start = time.monotonic()
    project.run()
    assert time.monotonic() - start < 60, "a stale lock?"
    assert set(project.run().values()) == {"current"}
    assert project.artifacts(max(p.name for p in project.runs.glob("toy-?"))) == undisturbed
    assert not list((project.runs / "store" / ".locks").glob("*")), "a lock was left behind"
    return kills


@pytest.mark.parametrize("first", range(0, SCENARIOS, TOGETHER))
def test_killed_again_and_again(first, tmp_path, machine_json, undisturbed):
    "A scenario mostly waits, for a moment to kill or for a kernel, so another goes on beside it."
    work = lambda seed: killed_again_and_again(
        seed, ToyProject(tmp_path / f"project{seed}", machine_json), undisturbed
    )
    with ThreadPoolExecutor(TOGETHER) as pool:
        scenarios = [pool.submit(work, seed) for seed in range(first, first + TOGETHER)]
        kills = [one.result() for one in scenarios]
    print("attempts that killed:", kills)
    assert min(kills) >= 1, f"nobody was killed in {KILLS_EACH} attempts: {kills}"


def test_two_that_start_together_share_a_run(tmp_path, machine_json):
    """Both find no run and want to make one; the second must take what the first has made in the
    meantime."""
    from llmeco_nb.locks import lock

    project = ToyProject(tmp_path / "project", machine_json)
    project.runs.mkdir(parents=True, exist_ok=True)
    with lock(project.runs / ".new.lock"):  # held until both stand before it
        started, deadline = (
            [project.start("run", "--profile", "toy") for _ in range(2)],
            time.monotonic() + 60,
        )
        before = lambda p: any(
            f.path.endswith(".new.lock") for f in psutil.Process(p.pid).open_files()
        )
        while not all(before(p) for p in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(before(p) for p in started)
    for p in started:
        out, err = p.communicate(timeout=120)
        assert p.returncode == 0, (out, err)
    assert [f.name for f in project.runs.glob("toy-*")] == ["toy-1"]


def test_a_run_that_is_still_being_made_is_none_yet(tmp_path, machine_json):
    """A runner that looks in the moment before the folder gets its name, or after one died then,
    must not take the unfinished one for the newest run."""
    from llmeco_nb.runner.store import Run

    project = ToyProject(tmp_path / "project", machine_json)
    project.runs.mkdir(parents=True, exist_ok=True)
    Run.create(project.runs / "toy-1", "toy").path.rename(project.runs / "toy-1.partial")
    assert Run.all(project.runs) == []
    project.run()
    assert [r.path.name for r in Run.all(project.runs)] == ["toy-2"]


def test_the_killer_kills(tmp_path, machine_json):
    """The crash tests would prove nothing if nobody died: a runner told to die at a rename does,
    before and after it."""
    project = ToyProject(tmp_path / "project", machine_json)
    for at in ("2", "2+", "6"):
        p = project.start("run", "--profile", "toy", DIE_AT=at)
        p.communicate(timeout=120)
        assert p.returncode == -signal.SIGKILL

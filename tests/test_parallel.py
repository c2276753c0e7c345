"""Several processes give the gradient that one gives, and leave nothing behind when one dies."""
import os
from pathlib import Path

import psutil
import pytest

from llmeco_nb.core import CellError
from llmeco_nb.parallel import launch

CASES = str(Path(__file__).with_name("parallel_cases.py"))

def check(found):
    assert [i for f in found for i in f["mine"]] == list(range(6, 12)), "another order of samples"
    assert len({f["counted"] for f in found}) > 1, "the shares count alike: nothing would be shown"
    for f in found:
        assert f["total"] == f["tokens"] and f["data"] < 1e-5 and f["fully"] < 1e-5
        assert f["sharded"] and abs(f["local"] - 1 / len(found)) < 0.1
        assert abs(f["norm"] / f["true_norm"] - 1) < 1e-5
        if "tensor" in f: assert f["split"] == 0.5 and f["tensor"] < 1e-5
    print([{k: f[k] for k in ("data", "fully", "tensor") if k in f} for f in found])

@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_are_one(processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check(launch(f"{CASES}:compare", processes, timeout=120))

@pytest.mark.gpu
def test_two_gpus_are_one():
    import torch
    if torch.cuda.device_count() < 2: pytest.skip("needs two CUDA devices")
    check(launch(f"{CASES}:compare", 2, timeout=300))

def test_a_death_ends_all(tmp_path):
    with pytest.raises(CellError, match="SIGKILL|Signal 9|exitcode"): launch(f"{CASES}:dies", 2, timeout=60, folder=str(tmp_path))
    pids = [int((tmp_path/str(r)).read_text()) for r in (0, 1) if (tmp_path/str(r)).exists()]
    assert pids and os.getpid() not in pids and not any(psutil.pid_exists(p) for p in pids)

"""A server for many minutes under load and swaps: memory and descriptors stay flat. By option:
`pytest tests/test_soak.py --soak 15`."""

import json
import signal
import time

import httpx
import numpy as np
import psutil
import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("casbin", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.registry import Registry
from llmeco_nb.interaction.crash_clients import CrashClients, kept_rows
from llmeco_nb.interaction.server_process import ServerProcess


def flat(values, slack):
    "Whether the last quarter is no higher than the second, but for some slack."
    quarter = len(values) // 4
    early, late = values[quarter : 2 * quarter], values[-quarter:]
    return np.median(late) <= np.median(early) + slack


def test_what_grows_is_found_to():
    assert flat([30, 90, *[100, 101] * 50], 5) and not flat(list(range(100)), 5)


def test_memory_and_descriptors_are_flat(request, tmp_path):
    minutes = request.config.getoption("soak")
    if not minutes:
        pytest.skip("takes minutes: --soak 15, or --soak 60")
    where = tmp_path / "f.sqlite"
    registry, admin = Registry(where, "a test"), KeyAdmin(where, "a test")
    for name in "abc":  # a third is opened anew each time
        registry.register(make_bundle(tmp_path / name, name=name))
    registry.promote("a")
    made = [admin.add(KeyOptions(name=f"person-{i}")) for i in range(4)]
    operator, _ = admin.add(KeyOptions(name="olga", role="operator"))
    head = {"Authorization": f"Bearer {operator}"}
    server = ServerProcess(where)
    process = psutil.Process(server.process.pid)
    memory, descriptors, threads, swaps = [], [], [], 0
    clients = CrashClients([server.address], [key for key, _ in made])
    until, pause = time.monotonic() + 60 * minutes, 60 * minutes / 200
    with clients, httpx.Client(base_url=server.address, headers=head, timeout=30) as http:
        while time.monotonic() < until:
            time.sleep(pause)
            change = dict(action="promote", model="abc"[(swaps + 1) % 3])
            assert http.post("/admin/deployments", json=change).status_code == 200
            assert http.get("/metrics").status_code == http.get("/readyz").status_code == 200
            swaps += 1
            memory.append(process.memory_info().rss / 1e6)
            descriptors.append(process.num_fds())
            threads.append(process.num_threads())
    server.end(signal.SIGTERM)
    found = kept_rows(clients.told, where, [row.id for _, row in made])
    told = dict(requests=len(clients.told.answers), swaps=swaps, minutes=minutes)
    for name, values in (("mb", memory), ("descriptors", descriptors), ("threads", threads)):
        told[name] = [round(v, 1) for v in (values[0], np.median(values), max(values), values[-1])]
    print(json.dumps(told))
    assert not found.lost.total() and not found.doubled.total() and not clients.told.refused
    assert set(clients.told.statuses) == {200} and not clients.told.unclear
    assert flat(memory, 10) and flat(descriptors, 3) and flat(threads, 2), told
    admin.close()
    registry.close()

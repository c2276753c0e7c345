"""Servers for tests: the command as a process of its own, or an application in a thread."""

import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from llmeco_nb.deployment.connections import ConnectionLimits, TimedProtocol
from llmeco_nb.deployment.serving import Server, listen

ROOT = Path(__file__).resolve().parent.parent

# the command, in a process that ends when the test does
COMMAND = "from llmeco_nb.cli import main; sys.exit(main())"
WITH_PARENT = (
    "import sys; from llmeco_nb.runner.kernel import die_with_parent; "
    "die_with_parent(int(sys.argv.pop(1))); "
)


class ServeCommand:
    """`llmeco serve` as a process of its own. It listens at a free port unless it is told one, and
    `address` is there once it answers."""

    def __init__(
        self,
        *words: object,  # Behind `llmeco serve`
        code: str = COMMAND,  # What the process runs, such as the command with another model
        env: dict[str, str] | None = None,  # Beside the variables of this process
    ):
        port = [] if "--port" in words else ["--port", "0"]
        # a file: nobody reads it while the server runs, and a pipe would be full
        self._errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_PARENT + code, str(os.getpid()), "serve", *port]
            + [str(word) for word in words],
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        self.address = ""
        late = threading.Timer(120, self.process.kill)
        late.start()
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r" answers at (https?://[\w.:\[\]]+)", line):
                self.address = found[1]
            if line.startswith("curl "):  # the next one
                break
        late.cancel()
        assert self.address, f"it does not answer: {self.errors()}"

    def errors(self) -> str:
        "What it has written to the standard error."
        self._errors.seek(0)
        return self._errors.read()

    def end(self, how: int = signal.SIGTERM) -> tuple[int, str, str]:
        "End it; its exit status, and all that it wrote to the standard output and error."
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.stdout is not None
        if not self.process.stdout.closed:  # else it has been ended before
            with self.process.stdout as rest:
                self.said += rest
        return self.process.returncode, "".join(self.said), self.errors()


@contextmanager
def serving(
    app: Any,  # Answers the requests
    *,
    tls: ssl.SSLContext | None = None,  # With one it speaks HTTPS
    http: Any = TimedProtocol,  # uvicorn's name or class of a connection
    loop: str = "auto",  # uvicorn's name of an event loop
    **limits: Any,  # Of a connection
) -> Iterator[tuple[str, int]]:
    "Have an application answer in a thread, as `llmeco serve` has it; where it listens."
    if limits:
        http = type("Limited", (http,), dict(limits=ConnectionLimits(**limits)))
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    config = uvicorn.Config(
        app,
        log_level="critical",
        server_header=False,
        lifespan="on",
        http=http,
        ws="none",
        loop=loop,
        timeout_graceful_shutdown=3,
    )
    server = Server(config, ready.set, tls)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


class LiveApp:
    "An application that answers from a thread, so that a test can reach into it."

    def __init__(self, app: Any):
        self.app = app
        self.open = ExitStack()
        _, self.port = self.open.enter_context(serving(app))
        self.address = f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        "End it, and wait until it is gone."
        self.open.close()

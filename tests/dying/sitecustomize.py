"""Put on PYTHONPATH by the crash tests: kills this process at the n-th rename, before or
after it, as `DIE_AT=n[+]` says."""

import os
import signal

if os.environ.get("DIE_AT") and not os.environ.get(
    "JPY_PARENT_PID"
):  # the runner dies, not its kernels
    left = int(os.environ["DIE_AT"].rstrip("+"))
    after = os.environ["DIE_AT"].endswith("+")

    def dying(call):
        def wrapped(*args, **kwargs):
            global left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    os.rename, os.replace = dying(os.rename), dying(os.replace)

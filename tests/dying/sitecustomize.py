"""Put on PYTHONPATH by the crash tests: kills this process at the n-th rename, before or
after it, as `DIE_AT=n[+]` says; notes in the file `FSYNCED` what is pushed to the disk and what is
renamed."""

import os
import signal

if os.environ.get("FSYNCED") and not os.environ.get("JPY_PARENT_PID"):

    def note(line):
        with open(os.environ["FSYNCED"], "a") as f:
            f.write(line + "\n")

    def noting_fsync(fd, call=os.fsync):
        call(fd)
        note(os.readlink(f"/proc/self/fd/{fd}"))

    def noting_rename(source, *args, call=os.rename, **kwargs):
        call(source, *args, **kwargs)
        note(f"renamed {source}")

    os.fsync, os.rename = noting_fsync, noting_rename

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

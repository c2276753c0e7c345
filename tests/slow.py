"""Which tests are slow, from the list `slow.tsv`: their mark, and in what order the workers take
them.

A test whose call took more than `LIMIT` seconds stands in the list with its seconds and carries the
mark `slow`. `pytest --note-slow` writes anew what the list says of the tests that it runs.
"""

from pathlib import Path

LIST = Path(__file__).with_name("slow.tsv")
LIMIT = 2.0  # seconds on an idle core
# The slow tests of these files share no costly fixture, so any worker may take any of them.
APART = ("test_notebooks.py", "test_crash.py")


def read() -> dict[str, float]:
    "The name of each slow test, without the folder -> its seconds."
    rows = (line.split("\t", 1) for line in LIST.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for seconds, name in rows}


def write(took: dict[str, float]):
    "Note `took`, seconds by test, and keep the rows of all other tests."
    kept = {name: seconds for name, seconds in read().items() if name not in took}
    rows = kept | {name: seconds for name, seconds in took.items() if seconds > LIMIT}
    text = "".join(f"{rows[name]:.0f}\t{name}\n" for name in sorted(rows))
    LIST.write_text(text, encoding="utf-8")


def short(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def unit(name: str, slow: dict[str, float]) -> str:
    "What one worker takes at a time: a file, or a single slow test of a file in `APART`."
    file = name.partition("::")[0]
    return name if file in APART and name in slow else file


def longest_first(names: list[str], slow: dict[str, float]) -> list[int]:
    "The order of the tests `names` by the seconds of their units; within a unit it stays."
    seconds = dict.fromkeys((unit(name, slow) for name in names), 0.0)
    for name in names:
        seconds[unit(name, slow)] += slow.get(name, 0)
    place = {u: k for k, u in enumerate(sorted(seconds, key=lambda u: -seconds[u]))}
    return sorted(range(len(names)), key=lambda k: place[unit(names[k], slow)])


def scheduler(config, log):
    "xdist's scheduler by scope, with our units as its scopes, in the order of collection."
    from xdist.scheduler import LoadScopeScheduling

    slow = read()

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit(short(nodeid), slow)

    config.option.loadscopereorder = False
    return ByUnit(config, log)

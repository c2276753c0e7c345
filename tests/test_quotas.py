"""What a key has used, and what of it the disk has: never less than was told, whatever happens;
exact after an orderly end; and hardly a request waits."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("sqlalchemy", reason="serving needs the extra `serve`")
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import UsageError, WriteError
from llmeco_nb.deployment.authentication import read_access
from llmeco_nb.deployment.keys import KeyOptions, KeyRing, Principal
from llmeco_nb.deployment.ledger import Ledger
from llmeco_nb.deployment.quotas import QuotaExceeded, Quotas, count_usage, day_of, read_usage
from llmeco_nb.deployment.usage_marks import UsageMarks, read_marks


def limited(quota):
    return Principal(id="a", name="ann", role="user", tokens_per_day=quota)


class Disk:
    "What is written, and what is on its way; in the place of a database and its writer."

    engine = SimpleNamespace(dialect=SimpleNamespace(name="sqlite"))

    def __init__(self):
        self.rows, self.queue, self.waits, self.others = {}, [], 0, 0

    def write(self, job, durable=True):
        self.others += 1
        return Future()

    def insert(self, rows, durable=False):
        assert durable
        self.waits += 1
        self.queue.append((rows, Future()))
        return self.queue[-1][1]

    def commit(self, fails=False):
        for rows, future in self.queue:
            if fails:
                future.set_exception(WriteError("no room"))
                continue
            for row in rows()[0].rows:
                self.rows[row["day"], row["key_id"], row["server"]] = row["tokens"]
            future.set_result(None)
        self.queue.clear()

    def counted(self, day, server=""):
        return sum(n for (of, _, by), n in self.rows.items() if of == day and by != server)


NOW = 1_000_000.0
steps = st.tuples(
    st.sampled_from(["ask", "ask", "answer", "answer", "fail", "leave", "cut", "stop", "look"]),
    st.integers(0, 1),
    st.integers(1, 60),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(steps, min_size=20, max_size=60), st.sampled_from([50, 400, 10_000]), st.integers(1, 2)
)
def test_the_disk_never_has_less_than_was_told(todo, quota, count):
    who, disk, day = limited(quota), Disk(), day_of(NOW)
    told, cut, at_work = 0, 0, []

    def opened():
        one = Quotas(lambda: NOW, UsageMarks(disk))
        one.load([], [("a", day, disk.counted(day))])
        return one

    servers = [opened() for _ in range(count)]
    for what, which, size in todo:
        which %= count
        if what == "ask":
            work = servers[which].tokens_for(who, size)
            try:
                work.__enter__()
                at_work.append((which, work, size))
            except QuotaExceeded:
                assert count > 1 or cut or told + sum(n for *_, n in at_work) + size > quota
        elif what in ("answer", "fail", "leave") and at_work:
            which, work, size = at_work.pop(size % len(at_work))
            disk.commit(fails=what == "fail")
            if what == "leave":
                assert not work.__exit__(KeyError, KeyError(), None)
                continue
            try:
                work.__exit__(None, None, None)
                told += size
            except WriteError:
                pass  # not told
        elif what == "cut":
            cut += 1
            disk.queue.clear()
            at_work.clear()
            servers = [opened() for _ in range(count)]
        elif what == "stop" and not any(one == which for one, *_ in at_work):
            servers[which].settle()
            disk.commit()
            if not cut and not at_work and count == 1:
                assert disk.counted(day) == told
            servers[which] = opened()
        elif what == "look":
            mine = servers[which].marks.server
            servers[which].load([], [("a", day, disk.counted(day, mine))])
        assert disk.counted(day) >= told
        if count == 1:
            assert told <= quota
            assert disk.counted(day) <= quota


def test_a_day_of_a_key_waits_for_the_disk_two_hundred_times_at_most():
    "And all other requests give the database nothing more to do."
    for quota, cost in (
        (1_000_000, 30),
        (1_000_000, 900),
        (1000, 12),
        (10, 1),
        (10**12, 3 * 10**9),
    ):
        disk = Disk()
        quotas, who, told = Quotas(lambda: NOW, UsageMarks(disk)), limited(quota), 0
        with pytest.raises(QuotaExceeded):
            while True:
                with quotas.tokens_for(who, cost):
                    disk.commit()
                told += cost
        assert quota - cost < told <= quota and disk.waits <= 201 and disk.others == 1
        assert disk.counted(day_of(NOW)) <= quota
    disk = Disk()
    quotas = Quotas(lambda: NOW, UsageMarks(disk))
    free = Principal(id="a", name="ann", role="user")
    for _ in range(100):
        with quotas.tokens_for(free, 10**9):
            pass
    quotas.settle()
    assert not disk.waits and not disk.others, "without a quota nothing depends on it"


def test_hardly_a_request_finds_its_mark_missing():
    "A commit takes as long as forty requests here, and a mark is there before it is needed."
    disk, missing = Disk(), 0
    quotas, who = Quotas(lambda: NOW, UsageMarks(disk)), limited(1_000_000)
    for n in range(33_000):
        held = quotas.tokens_for(who, 30)
        missing += held.__enter__().backed is not None
        if n % 40 == 0 or missing == 1:
            disk.commit()
        held.__exit__(None, None, None)
    assert missing == 1, "the first of the day"


def test_a_request_over_midnight_counts_on_the_day_on_which_it_came():
    now, disk = 86_400 * 20.0 - 1, Disk()
    quotas, who = Quotas(lambda: now, UsageMarks(disk)), limited(100)
    with quotas.tokens_for(who, 90) as held:
        disk.commit()
        now += 2
    assert day_of(held.at) != day_of(now)
    with quotas.tokens_for(who, 90):
        disk.commit()
    quotas.settle()
    disk.commit()
    assert disk.counted(day_of(held.at)) == 91 and disk.counted(day_of(now)) == 90
    first = quotas.marks.server
    now -= 2  # a clock that is set back takes nothing from what was written
    with quotas.tokens_for(who, 5):
        disk.commit()
    assert quotas.marks.server != first and disk.counted(day_of(now)) == 91 + 6


def test_servers_of_one_database_add_up(tmp_path):
    where, quota, told = tmp_path / "f.sqlite", 1000, 0
    ledgers = [Ledger(where) for _ in range(2)]
    both = [Quotas(marks=UsageMarks(one)) for one in ledgers]
    who, refused = limited(quota), set()
    # told by a server that wrote no marks
    ledgers[0].write(lambda c: count_usage(c, "a", 100, time.time())).result()
    turn = 0
    while len(refused) < 2:
        ledger, one = ledgers[turn % 2], both[turn % 2]
        read_access(ledger, KeyRing(), one)
        try:
            with one.tokens_for(who, 7) as held:
                count = lambda c: count_usage(c, "a", 7, held.at)
                ledger.write(count, durable=False).result()
            told += 7
        except QuotaExceeded:
            refused.add(turn % 2)
        turn += 1
    assert quota - 100 - 2 * (10 + 7) <= told <= quota - 100
    for ledger, one in zip(ledgers, both):
        one.settle()
        ledger.close()
    last = Ledger(where)
    with last.engine.connect() as c:
        day = day_of(time.time())
        assert read_marks(c, day) == [("a", day, told)]
        assert read_usage(c, day) == [("a", day, told + 100)]
    last.close()


@pytest.mark.parametrize(("name", "bits"), [("requests_per_minute", 31), ("tokens_per_day", 63)])
def test_a_limit_that_no_column_takes_is_refused(name, bits):
    assert getattr(KeyOptions(name="ann", **{name: 2**bits - 1}), name) == 2**bits - 1
    with pytest.raises(UsageError, match=f"{name} is {2**bits}; it must be at most {2**bits - 1}"):
        KeyOptions(name="ann", **{name: 2**bits})

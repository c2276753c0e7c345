"""The executor and what it stands on: forecasts of seconds, fair turns, kept deadlines, nothing
computed for who has left, a model that hangs."""

import asyncio
import math
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pydantic", reason="serving needs the extra `serve`")

from llmeco_nb.core import UsageError
from llmeco_nb.deployment.cost_model import CostModel
from llmeco_nb.deployment.executor import ExecutorOptions, LocalExecutor
from llmeco_nb.deployment.fair_queue import Busy, Expired, FairQueue, QueuedRequest, Work
from llmeco_nb.deployment.model_batch import Piece, WholeAnswers

ROOT = Path(__file__).resolve().parent.parent
drawn = settings(max_examples=100, deadline=None)


# -- how long a batch takes


@drawn
@given(
    fixed=st.floats(0, 0.1),
    per_unit=st.floats(1e-6, 1e-2),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    slower=st.floats(0.3, 4),
)
def test_a_line_is_found_whatever_is_sent(fixed, per_unit, sizes, slower):
    true = lambda cost: fixed + per_unit * cost
    model = CostModel(((64, true(64)), (512, true(512))))
    for cost in sizes * math.ceil(200 / len(sizes)):
        model.learn(cost, slower * true(cost))
    assert model.fixed >= 0 and model.per_unit > 0
    for cost in sizes:  # what is sent often is known, however fast the machine has become
        expected = slower * true(cost)
        assert abs(model.seconds(cost) - expected) < 0.4 * expected
    if len(set(sizes)) == 1:  # and of what is not sent, what was measured
        assert abs(model.seconds(5000) - slower * true(5000)) < 0.1 * slower * true(5000)


def test_single_words_say_little_of_a_long_request():
    true = lambda cost: 0.02 + 1e-4 * cost
    model, noise = CostModel(((64, true(64)), (512, true(512)))), random.Random(0)
    for _ in range(200):
        model.learn(4, true(4) * noise.uniform(0.8, 1.2))
    assert 0.5 < model.seconds(8192) / true(8192) < 2


def test_a_pause_of_the_process_is_no_speed():
    "A server that stood still for a while knows soon again what a request takes."
    true = lambda cost: 0.02 + 1e-4 * cost
    model = CostModel(((64, true(64)), (512, true(512))))
    model.learn(20, 30.0)
    assert model.seconds(8192) < 5 * true(8192)
    for _ in range(20):
        model.learn(20, true(20))
    assert model.seconds(8192) < 2.5 * true(8192)


# -- whose turn it is


def request(costs, tenant="", deadline=1e9):
    return QueuedRequest([Work("text", None, cost) for cost in costs], deadline, tenant)


asks = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50), min_size=1, max_size=6),
        st.sampled_from("abc"),
        st.sampled_from(["add", "take", "take", "drop"]),
    ),
    max_size=40,
)


@drawn
@given(asks, st.integers(0, 2**32))
def test_every_item_is_taken_once_in_its_order(scenes, seed):
    queue, dice, alive, took = FairQueue(), random.Random(seed), [], {}
    for costs, tenant, what in scenes:
        ask = request(costs, tenant)
        queue.add(ask)
        alive.append(ask)
        took[ask] = []
        if what == "take" and queue:
            chosen = queue.next() if dice.random() < 0.7 else dice.choice(list(queue.asks))
            took[chosen].append(queue.take(chosen))
        if what == "drop":
            queue.drop(dice.choice(alive))
        left = [a for a in alive if not a.closed and a.taken < len(a.works)]
        assert list(queue.asks) == left and queue.rest == sum(a.rest for a in left)
        for name, line in queue.lines.items():
            assert line.rest == sum(a.rest for a in left if a.tenant == name)
    while queue:
        ask = queue.next()
        took[ask].append(queue.take(ask))
    assert queue.next() is None and not queue.lines and queue.rest == 0
    for ask, items in took.items():
        assert items == list(range(len(items)))
        assert ask.closed or len(items) == len(ask.works)


@drawn
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 30))
def test_a_short_request_waits_for_no_long_one(long, short, before):
    queue, one, other = FairQueue(), request([10] * (long + before)), request([10] * short)
    queue.add(one)
    for _ in range(before):
        queue.take(queue.next())
    queue.add(other)
    taken = 0
    while other in queue.asks:
        queue.take(queue.next())
        taken += 1
    assert taken <= 2 * short + 1


def test_out_of_turn_and_left_behind():
    "What was taken for its deadline, or has left, does not make others wait for it."
    queue, pressing, other = FairQueue(), request([10] * 60), request([10] * 60)
    queue.add(pressing)
    queue.add(other)
    while pressing in queue.asks:
        queue.take(pressing)
    short = request([10])
    queue.add(short)
    queue.take(queue.next())
    queue.take(queue.next())
    assert short not in queue.asks
    queue = FairQueue()
    for ask in (large := request([1000], "a"), small := request([1], "a"), request([1] * 500, "b")):
        queue.add(ask)
    queue.drop(large)
    for _ in range(3):
        queue.take(queue.next())
    assert small not in queue.asks


@drawn
@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 30))
def test_tenants_get_equal_shares(many, few, cost):
    queue = FairQueue()
    for _ in range(many):
        queue.add(request([cost], "a"))
    for _ in range(few):
        queue.add(request([cost], "b"))
    got = {"a": 0, "b": 0}
    while queue:
        ask = queue.next()
        queue.take(ask)
        got[ask.tenant] += cost
        if all(name in queue.lines for name in "ab"):
            assert abs(got["a"] - got["b"]) <= 2 * cost


@drawn
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 200)),
        max_size=25,
    )
)
def test_what_is_let_in_can_be_kept(requests):
    "Of those who were let in, all meet their deadlines when the nearest always goes first."
    queue, kept = FairQueue(), []
    for costs, deadline in requests:
        ask = request(costs, deadline=float(deadline))
        if queue.lateness(ask, now=0.0, per_unit=1.0) <= 0:
            queue.add(ask)
            kept.append(ask)
        else:  # no order would have kept all
            everybody, now, late = sorted([*kept, ask], key=lambda a: a.deadline), 0.0, False
            for one in everybody:
                now += one.rest
                late |= now > one.deadline
            assert late
    now = 0.0
    while queue:
        ask = queue.most_urgent(now, 1.0, margin=21.0) or queue.next()
        item = queue.take(ask)
        now += ask.works[item].cost
        if ask.taken == len(ask.works):
            assert now <= ask.deadline


# -- the executor


class Clockwork:
    "A millisecond for every character; says upper case; fails on texts that hold `fire`."

    def __init__(self):
        self.batches, self.inside, self.hold = [], 0, threading.Event()
        self.hold.set()

    def prepare(self, text):
        return Work(text, text, max(1, len(text)))

    def open(self):
        return WholeAnswers(self.predict)

    def predict(self, works):
        self.inside += 1
        assert self.inside == 1, "two predictions at a time"
        try:
            self.batches.append([work.text for work in works])
            time.sleep(sum(work.cost for work in works) / 1000)
            self.hold.wait()
            if any("fire" in work.text for work in works):
                raise ValueError("fire")
            return [work.text.upper() for work in works]
        finally:
            self.inside -= 1


def known():
    "A millisecond for every character."
    return CostModel(((10, 0.01), (100, 0.1)))


async def ask(executor, texts, seconds=None, tenant=""):
    allowed = executor.options.deadline if seconds is None else seconds
    deadline = asyncio.get_running_loop().time() + allowed
    works = await executor.prepare(texts, deadline)
    return await executor.answer(works, deadline, tenant)


def play(scene, **options):
    "Run a scene with an executor, for ten seconds at most."

    async def run():
        async with LocalExecutor(Clockwork(), ExecutorOptions(**options), known()) as executor:
            async with asyncio.timeout(10):
                await scene(executor)

    asyncio.run(run())


def test_everybody_gets_the_own_answer():
    async def scene(executor):
        asked = [[f"{i}-{k}" for k in range(1 + i % 3)] for i in range(60)]
        got = await asyncio.gather(*(ask(executor, a) for a in asked))
        assert got == asked
        assert not executor.queue and not executor.answers and executor.chars == 0
        assert len(executor.predictor.batches) < 60

    play(scene)


def test_batches_hold_a_slice_of_time_and_one_item_may_exceed_it():
    async def scene(executor):
        texts = [["x" * 10]] * 20 + [["y" * 200]]
        await asyncio.gather(*(ask(executor, t) for t in texts))
        for batch in executor.predictor.batches:
            assert len("".join(batch)) <= 40 or batch == ["y" * 200]

    play(scene, slice_seconds=0.03)


def test_a_failure_stays_with_its_item():
    async def scene(executor):
        asked = [["a"], ["fire"], ["b", "fire!"], ["c"]]
        got = await asyncio.gather(*(ask(executor, a) for a in asked), return_exceptions=True)
        assert got[0] == ["A"] and got[3] == ["C"]
        assert all(isinstance(g, ValueError) for g in got[1:3])
        assert await ask(executor, ["after"]) == ["AFTER"]

    play(scene)


def test_who_leaves_is_not_computed():
    async def scene(executor):
        first = asyncio.create_task(ask(executor, ["x" * 200]))
        await asyncio.sleep(0.02)
        gone = [asyncio.create_task(ask(executor, [f"gone {i}"])) for i in range(20)]
        stays = asyncio.create_task(ask(executor, ["stays"]))
        await asyncio.sleep(0.02)
        for one in gone:
            one.cancel()
        assert await stays == ["STAYS"] and await first
        await asyncio.gather(*gone, return_exceptions=True)
        assert not any("gone" in text for b in executor.predictor.batches for text in b)
        assert not executor.answers and executor.chars == 0

    play(scene)


def test_a_long_request_does_not_keep_short_ones():
    async def scene(executor):
        long = asyncio.create_task(ask(executor, ["twenty characters .."] * 64))  # 1.3 s
        await asyncio.sleep(0.05)
        for i in range(8):
            begun = time.monotonic()
            await ask(executor, ["short"])
            assert time.monotonic() - begun < 0.6
        assert not long.done()
        assert len(await long) == 64

    play(scene)


def test_what_cannot_be_in_time_is_refused_at_once_and_told_when():
    async def scene(executor):
        waits = []

        async def one():
            begun = time.monotonic()
            try:
                return await ask(executor, ["x" * 50], 0.5)
            finally:
                waits.append(time.monotonic() - begun)

        got = await asyncio.gather(*(one() for _ in range(40)), return_exceptions=True)
        refused = [g for g in got if isinstance(g, Busy)]
        assert 25 <= len(refused) <= 36 and all(1 <= e.retry_after <= 3 for e in refused)
        assert sum(w < 0.1 for w in waits) >= len(refused) and max(waits) < 0.7
        assert sum(isinstance(g, Expired) for g in got) <= 2
        assert await ask(executor, ["patient"], 60) == ["PATIENT"]

    play(scene)


def test_what_never_could_be_in_time_is_wrong():
    async def scene(executor):
        with pytest.raises(UsageError, match="takes about 2.0 s here.*within 0.5 s"):
            await ask(executor, ["x" * 100] * 20)
        assert await ask(executor, ["x" * 100]) == ["X" * 100]

    play(scene, deadline=0.5)


def test_the_queue_is_bounded_by_requests_and_by_characters():
    async def scene(executor):
        executor.predictor.hold.clear()
        asked = [asyncio.create_task(ask(executor, ["x" * 10])) for _ in range(30)]
        await asyncio.sleep(0.1)
        refused = [one for one in asked if one.done()]
        assert all(isinstance(one.exception(), Busy) for one in refused)
        assert len(executor.queue) <= 5 and 23 <= len(refused) <= 25
        assert executor.chars <= 60
        executor.predictor.hold.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert executor.chars == 0

    play(scene, max_waiting=5)
    play(scene, max_waiting_chars=55)


def test_a_tenant_has_no_more_than_its_share():
    async def scene(executor):
        executor.predictor.hold.clear()
        first = asyncio.create_task(ask(executor, ["first"], tenant="b"))
        await asyncio.sleep(0.02)
        some = asyncio.create_task(ask(executor, ["x" * 50], tenant="b"))
        many = [asyncio.create_task(ask(executor, ["x" * 50], tenant="a")) for _ in range(30)]
        await asyncio.sleep(0.05)
        mine = [one for one in executor.queue.asks if one.tenant == "a"]
        assert 4 <= len(mine) <= 11  # about half a second of the deadline
        other = asyncio.create_task(ask(executor, ["y" * 50], tenant="b"))
        await asyncio.sleep(0.02)
        assert not other.done()
        executor.predictor.hold.set()
        assert await asyncio.gather(first, some, other)
        await asyncio.gather(*many, return_exceptions=True)

    play(scene, deadline=1.0)


def test_a_model_that_hangs_keeps_nobody():
    "Deadlines pass on time, newcomers are refused, the watcher hears of it, and closing ends."

    async def run():
        executor = LocalExecutor(Clockwork(), ExecutorOptions(deadline=0.3), known())
        executor.predictor.hold.clear()
        begun = time.monotonic()
        late = asyncio.gather(*(ask(executor, [t]) for t in "abc"), return_exceptions=True)
        assert all(isinstance(one, Expired) for one in await late)
        assert 0.25 < time.monotonic() - begun < 0.6
        await asyncio.sleep(0.6)
        with pytest.raises(Busy):
            await ask(executor, ["d"])
        await asyncio.sleep(max(0.0, 2.2 - (time.monotonic() - begun)))
        assert executor.health().stalled
        begun = time.monotonic()
        await executor.close(within=0.2)
        assert time.monotonic() - begun < 1
        executor.predictor.hold.set()

    asyncio.run(run())


def test_a_pause_locks_nobody_out():
    "Legal requests are answered by an idle server, however slow it has just been."

    async def scene(executor):
        executor.cost_model.learn(1, 5.0)
        executor.cost_model.learn(1, 5.0)
        assert len(await ask(executor, ["x" * 10] * 20)) == 20

    play(scene, deadline=1.0)


def test_what_any_batch_costs_does_not_end_batching():
    "Of a model whose calls take longer than a slice, batches hold several items all the same."

    class Heavy(Clockwork):
        def predict(self, works):
            time.sleep(0.08)
            return super().predict(works)

    async def run():
        known = CostModel(((1, 0.081), (100, 0.18)))
        options = ExecutorOptions(deadline=2.0)
        async with LocalExecutor(Heavy(), options, known) as executor:
            got = await asyncio.gather(*(ask(executor, ["x"]) for _ in range(100)))
            assert got == [["X"]] * 100 and len(executor.predictor.batches) <= 5

    asyncio.run(run())


def test_an_empty_request_and_a_late_one_are_refused():
    async def scene(executor):
        with pytest.raises(UsageError, match="one item or more"):
            executor.submit([])
        work, now = executor.predictor.prepare("x" * 100), asyncio.get_running_loop().time()
        with pytest.raises(Expired):
            executor.submit([work], now - 1)
        with pytest.raises(Expired):
            executor.submit([work], now + 0.01)
        with pytest.raises(UsageError, match="Send a shorter text"):
            await ask(executor, ["x" * 2000])
        assert not executor.answers

    play(scene, deadline=1.0)


def test_who_leaves_is_not_prepared_and_who_waits_for_it_hears_in_time():
    class Slow(Clockwork):
        prepared = 0

        def prepare(self, text):
            self.prepared += 1
            time.sleep(0.1)
            return Work(text, text, 1)

    async def run():
        executor = LocalExecutor(Slow(), ExecutorOptions(deadline=0.3), known())
        begun = time.monotonic()
        asked = [asyncio.create_task(ask(executor, ["x" * 3000])) for _ in range(20)]
        got = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - begun < 0.5
        late = [g for g in got if isinstance(g, Expired)]
        assert len(late) >= 10 and executor.predictor.prepared <= 10
        await executor.close()
        with pytest.raises((Expired, Busy)):
            async with asyncio.timeout(2):
                await ask(executor, ["x" * 3000])

    asyncio.run(run())


def test_a_crash_of_a_library_is_told_and_ends_nothing():
    class Crash(BaseException):
        "As a panic of a library in Rust is."

    class Crashing(Clockwork):
        def open(self):
            batch = WholeAnswers(self.predict)
            whole = batch.step

            def step():
                if any(work.text == "crash" for work in batch.works.values()):
                    raise Crash
                if any(work.text == "stop" for work in batch.works.values()):
                    raise StopIteration
                return whole()

            batch.step = step
            return batch

    async def run():
        async with LocalExecutor(Crashing(), cost_model=known()) as executor:
            for text in ("crash", "stop"):
                with pytest.raises(RuntimeError):
                    async with asyncio.timeout(2):
                        await ask(executor, [text])
            assert await ask(executor, ["well"]) == ["WELL"]

    asyncio.run(run())


def test_closing_answers_what_was_admitted():
    async def run():
        executor = LocalExecutor(Clockwork(), cost_model=known())
        tasks = [asyncio.create_task(ask(executor, ["x" * 20])) for _ in range(5)]
        await asyncio.sleep(0.01)
        await executor.close()
        assert await asyncio.gather(*tasks) == [["X" * 20]] * 5
        with pytest.raises(Busy):
            await ask(executor, ["more"])

    asyncio.run(run())


def test_long_texts_are_prepared_beside_the_event_loop_and_short_ones_meanwhile():
    class Slow(Clockwork):
        threads: set = set()

        def prepare(self, text):
            if len(text) > 100:
                self.threads.add(threading.current_thread().name)
                time.sleep(0.05)
            return Work(text, text, 1)

    async def run():
        async with LocalExecutor(Slow(), cost_model=known()) as executor:
            Slow.threads.clear()
            long = asyncio.create_task(ask(executor, ["long " * 3000] * 8))
            await asyncio.sleep(0.02)
            begun = time.monotonic()
            await ask(executor, ["short"])
            assert time.monotonic() - begun < 0.1 and not long.done()
            assert len(await long) == 8 and Slow.threads == {"prepare"}
            with pytest.raises(Expired):  # preparing counts against the deadline
                await ask(executor, ["long " * 3000] * 8, 0.1)

    asyncio.run(run())


class Spelling:
    "A batch that gives a letter of each item at a step."

    def __init__(self):
        self.left, self.next, self.most = {}, 0, 0

    def __len__(self):
        return len(self.left)

    def add(self, work):
        self.next += 1
        self.left[self.next] = list(work.text)
        return self.next

    def drop(self, slot):
        self.left.pop(slot, None)

    def step(self):
        time.sleep(0.005)
        self.most = max(self.most, len(self.left))
        pieces = [Piece(k, letters.pop(0), not letters) for k, letters in self.left.items()]
        self.left = {k: letters for k, letters in self.left.items() if letters}
        return pieces


def test_pieces_come_step_by_step_and_who_leaves_frees_its_place():
    class Speller(Clockwork):
        def open(self):
            return Spelling()

    async def run():
        async with LocalExecutor(Speller(), cost_model=known()) as executor:

            async def spell(word, stop=None):
                with executor.submit([executor.predictor.prepare(word)]) as answers:
                    found = ""
                    async for item, letter in answers:
                        assert item == 0
                        found += letter
                        if stop and len(found) == stop:
                            break
                    return found

            words = ["first", "second", "a long word, and more of it", "x"]
            got = await asyncio.gather(*(spell(w) for w in words), spell("y" * 500, stop=3))
            assert got == [*words, "yyy"]
            assert executor.batch.most >= 3
            await asyncio.sleep(0.05)
            assert not executor.slots and not len(executor.batch) and executor.worker.done()

    asyncio.run(run())


def test_a_batch_that_breaks_is_begun_anew():
    class Broken(Clockwork):
        opened = 0

        def open(self):
            self.opened += 1
            batch = WholeAnswers(self.predict)
            if self.opened == 1:
                batch.step = lambda: 1 / 0
            return batch

    async def run():
        async with LocalExecutor(Broken(), cost_model=known()) as executor:
            with pytest.raises(ZeroDivisionError):
                await ask(executor, ["a", "b"])
            assert await ask(executor, ["c"]) == ["C"]

    asyncio.run(run())


def test_a_hung_model_does_not_keep_a_process():
    code = """
import asyncio, time
from llmeco_nb.deployment.executor import ExecutorOptions, LocalExecutor
from llmeco_nb.deployment.fair_queue import Expired, Work
from llmeco_nb.deployment.model_batch import WholeAnswers

class Hangs:
    hangs = False
    def prepare(self, text):
        return Work(text, text, 1)
    def open(self):
        return WholeAnswers(self.predict)
    def predict(self, works):
        time.sleep(100 * self.hangs)
        return [1 for _ in works]

async def run():
    executor = LocalExecutor(Hangs(), ExecutorOptions(deadline=0.2))
    Hangs.hangs = True
    try:
        await executor.answer(await executor.prepare(["a"], 1e9))
    except Expired:
        await executor.close(0.1)
        print("left")

asyncio.run(run())
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "left\n" and done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 20

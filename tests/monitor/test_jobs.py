"""Jobs: every verb in every state as measured with qemu-storage-daemon 10.0, groups, errors."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.engine.kernel import Driver
from diskwright.jobs import job as jobs_module
from diskwright.jobs.groups import Group
from diskwright.jobs.job import Job, Jobs
from diskwright.jobs.states import NEXT, VERBS, Status
from diskwright.monitor import all_commands
from diskwright.monitor.daemon import Daemon
from monitor.inside import Peer, with_peers
from monitor.running import THEIRS, Client, daemon, needs_qsd, needs_unix
from monitor.testjob import CHUNK, TestWork, declared

pytestmark = needs_unix
all_commands()
MEASURED: dict[str, dict[str, list[Any]]] = json.loads(
    Path(__file__).with_name("verbs.json").read_text()
)
"""State -> verb (with ``!``: and ``force``) -> [error, events, state afterwards]."""
SLOW = {"chunks": 8, "speed": 1}


@pytest.fixture
def works() -> Iterator[dict[str, TestWork]]:
    with declared() as found:
        yield found


def job(id: str = "j", **more: Any) -> dict[str, Any]:
    return {"job-id": id, **{name.replace("_", "-"): value for name, value in more.items()}}


def grouped(*members: dict[str, Any], mode: str = "grouped") -> dict[str, Any]:
    actions = [{"type": "x-job", "data": one} for one in members]
    return {"actions": actions, "properties": {"completion-mode": mode}}


async def brought(peer: Peer, state: str) -> None:
    """A job ``j`` that is in ``state``."""
    if state in ("running", "paused"):
        await peer.ask("x-job", job(**SLOW))
        await peer.told(status="running")
    elif state in ("ready", "standby"):
        await peer.ask("x-job", job(ready=True))
        await peer.told("BLOCK_JOB_READY")
    elif state == "waiting":
        await peer.ask("transaction", grouped(job(), job("k", **SLOW)))
        await peer.told(status="waiting")
    elif state == "pending":
        await peer.ask("x-job", job(auto_finalize=False))
        await peer.told("BLOCK_JOB_PENDING")
    elif state == "concluded":
        await peer.ask("x-job", job(auto_dismiss=False))
        await peer.told(status="concluded")
    if state in ("paused", "standby"):
        await peer.do("job-pause", id="j")
        await peer.told(status=state)


async def state_of(peer: Peer, id: str = "j") -> str:
    for one in await peer.do("query-jobs"):
        if one["id"] == id:
            return str(one["status"])
    return ""


def asked(verb: str) -> tuple[str, dict[str, Any]]:
    """The command and its arguments that a verb of the measured ones stands for."""
    name = verb.rstrip("!")
    by_device = name.startswith("block-") and not name.endswith(("finalize", "dismiss"))
    arguments: dict[str, Any] = {"device" if by_device else "id": "j"}
    if verb != name:
        arguments["force"] = True
    if name == "block-job-set-speed":
        arguments["speed"] = 5
    return name, arguments


@pytest.mark.parametrize("state", MEASURED)
def test_every_verb(state: str, works: dict[str, TestWork]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        for verb, (error, events, after) in MEASURED[state].items():
            await brought(peer, state)
            peer.take()
            reply = await peer.ask(*asked(verb))
            found = reply.get("error")
            assert (f"{found['class']}: {found['desc']}" if found else "") == error, verb
            while len(peer.events) < len(events):
                peer.events.append(cast(Any, await peer.hear()))
            assert peer.take() == events, verb
            assert await state_of(peer) == after, verb
            assert not peer.events, verb
            await daemon.jobs.cancel_all()
            await peer.do("query-jobs")
            peer.events.clear()

    with_peers(talk)


def qemus_job(client: Client, state: str) -> None:
    """A job ``j`` of qemu-storage-daemon that is in ``state``."""
    plain = {"job-id": "j", "device": "a", "target": "c", "sync": "full"}
    ends = {"auto-finalize": state != "pending", "auto-dismiss": state != "concluded"}
    other = {**plain, "job-id": "k", "device": "b", "target": "d", "speed": 1}
    match state:
        case "none":
            return
        case "running" | "paused":
            client.do("blockdev-backup", **plain, speed=1)
        case "ready" | "standby":
            client.do("blockdev-mirror", **plain)
        case "waiting":
            actions = [{"type": "blockdev-backup", "data": one} for one in (plain, other)]
            grouped = {"completion-mode": "grouped"}
            client.do("transaction", actions=actions, properties=grouped)
        case _:
            client.do("blockdev-backup", **plain, **ends)
    before = {"paused": "running", "standby": "ready"}.get(state, state)
    for wanted in (before, state):
        if wanted != before:
            client.do("job-pause", id="j")
        while (found := qemus_state(client, "j")) != wanted:
            assert found, (state, client.events)
    while any(one["busy"] for one in client.do("query-block-jobs")):
        pass
    client.events.clear()


def qemus_state(client: Client, id: str) -> str:
    for one in client.do("query-jobs"):
        if one["id"] == id:
            return str(one["status"])
    return ""


@pytest.mark.long
@needs_qsd
@pytest.mark.parametrize("state", MEASURED)
def test_qemu_does_what_was_measured(state: str, tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).write_bytes(b"x" * (8 << 20))
    for verb, (error, events, after) in MEASURED[state].items():
        with daemon(THEIRS, tmp_path) as (_, (client,)):
            for name in "abcd":
                file = {"driver": "file", "filename": name}
                client.do("blockdev-add", driver="raw", node_name=name, file=file)
            qemus_job(client, state)
            reply = client.send(*asked(verb))
            found = reply.get("error")
            assert (f"{found['class']}: {found['desc']}" if found else "") == error, verb
            while len(client.events) < len(events):
                client.events.append(client.read())
            seen = [one["data"].get("status", one["event"]) for one in client.events]
            assert seen == events, verb
            assert qemus_state(client, "j") == after, verb


def test_measured_is_what_the_tables_say() -> None:
    """Where QEMU accepts a verb in a state, it does so here, and the other way round."""
    for state, verbs in MEASURED.items():
        for verb, (error, _, _) in verbs.items():
            name = verb.removeprefix("block-").removeprefix("job-").rstrip("!")
            refused = error.endswith(f"in state '{state}' cannot accept command verb '{name}'")
            if state != "none" and name != "resume":
                assert refused == (state not in VERBS[name]), (state, verb)


def test_block_jobs_are_told_of(works: dict[str, TestWork]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await peer.ask("x-job", job(chunks=3, speed=7, auto_finalize=False))
        while not (found := await peer.do("query-block-jobs"))[0]["offset"]:
            pass
        assert found == [
            {
                "type": "mirror", "device": "j", "len": 3 * CHUNK, "offset": CHUNK, "speed": 7,
                "busy": False, "paused": False, "io-status": "ok", "ready": False,
                "status": "running", "auto-finalize": False, "auto-dismiss": True,
            }
        ]  # fmt: skip
        assert await peer.do("query-jobs") == [
            {"id": "j", "type": "mirror", "status": "running", "current-progress": CHUNK,
             "total-progress": 3 * CHUNK}
        ]  # fmt: skip
        peer.events.clear()
        await peer.do("block-job-set-speed", device="j", speed=0)
        event = await peer.told("BLOCK_JOB_PENDING")
        assert event["data"] == {"type": "mirror", "id": "j"}
        await peer.do("job-finalize", id="j")
        event = await peer.told("BLOCK_JOB_COMPLETED")
        assert event["data"] == {"type": "mirror", "device": "j", "len": 3 * CHUNK,
                                 "offset": 3 * CHUNK, "speed": 0}  # fmt: skip
        for speed, error in ((-4, "Parameter 'speed' expects a non-negative value"),):
            await peer.ask("x-job", job("k", **SLOW))
            reply = await peer.ask("block-job-set-speed", {"device": "k", "speed": speed})
            assert reply["error"]["desc"] == error
        reply = await peer.ask("x-job", job("k"))
        assert reply["error"]["desc"] == "Job ID 'k' already in use"
        reply = await peer.ask("x-job", job("1j"))
        assert reply["error"]["desc"] == "Invalid job ID '1j'"

    with_peers(talk)


def ends(peer: Peer) -> list[str]:
    """The events so far as ``id state`` and ``id EVENT``."""
    found = []
    for one in peer.events:
        data = one["data"]
        name = data.get("status", one["event"].removeprefix("BLOCK_JOB_"))
        found.append(f"{data.get('id', data.get('device'))} {name}")
    peer.events.clear()
    return found


# What is done (jobs, mode, then verbs), and the events behind `running` as QEMU has them.
GROUPS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str]] = {
    "both": (
        grouped(job("j"), job("k")), [],
        "j waiting, k waiting, k pending, j pending, k COMPLETED, k concluded, k null, "
        "j COMPLETED, j concluded, j null",
    ),
    "one by hand": (
        grouped(job("j", auto_finalize=False), job("k")), [("job-finalize", "k")],
        "j waiting, k waiting, k pending, j pending, j PENDING, k COMPLETED, k concluded, k null, "
        "j COMPLETED, j concluded, j null",
    ),
    "cancelled while pending": (
        grouped(job("j"), job("k", auto_finalize=False)), [("job-cancel", "j")],
        "j waiting, k waiting, k pending, k PENDING, j pending, k aborting, k CANCELLED, "
        "k concluded, k null, j aborting, j CANCELLED, j concluded, j null",
    ),
    "cancelled": (
        grouped(job("j", **SLOW), job("k", **SLOW)), [("job-cancel", "k")],
        "k aborting, j aborting, k CANCELLED, k concluded, k null, j CANCELLED, j concluded, "
        "j null",
    ),
    "cancelled beside a paused one": (
        grouped(job("j", **SLOW), job("k", **SLOW)), [("job-pause", "j"), ("job-cancel", "k")],
        "j paused, k aborting, j running, j aborting, k CANCELLED, k concluded, k null, "
        "j CANCELLED, j concluded, j null",
    ),
    "failed": (
        grouped(job("j", **SLOW), job("k", error=errno.EIO)), [],
        "k ERROR, k aborting, j aborting, k COMPLETED, k concluded, k null, j CANCELLED, "
        "j concluded, j null",
    ),
    "failed at the end": (
        grouped(job("j"), job("k", bad_end=True)), [],
        "j waiting, k waiting, k pending, j pending, k aborting, k COMPLETED, k concluded, k null, "
        "j aborting, j CANCELLED, j concluded, j null",
    ),
    "each alone": (
        grouped(job("j"), job("k", error=errno.EIO), mode="individual"), [],
        "k ERROR, k aborting, k COMPLETED, k concluded, k null, j waiting, j pending, "
        "j COMPLETED, j concluded, j null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_groups(case: str, works: dict[str, TestWork]) -> None:
    begin, verbs, wanted = GROUPS[case]

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        assert (await peer.ask("transaction", begin)) == {"return": {}}
        found = 0
        for verb, id in verbs:
            while not all(one.ended or not one.busy for one in daemon.jobs):
                await daemon.driver.turn()
            await daemon.driver.turn()
            await peer.do(verb, id=id)
        while daemon.jobs.all:
            await daemon.driver.turn()
        await peer.do("query-jobs")
        events = ends(peer)
        assert sorted(events[:4]) == ["j created", "j running", "k created", "k running"], events
        found = events[4:]
        if begin["properties"]["completion-mode"] == "individual":
            for id in "jk":
                own = [one for one in wanted.split(", ") if one.startswith(id)]
                assert [one for one in found if one.startswith(id)] == own
        else:
            assert found == wanted.split(", ")
        kept = [work.log[-1] for work in works.values()]
        if "CANCELLED" in wanted or case.startswith("failed"):
            assert kept == ["abort", "abort"]
        elif case != "each alone":
            assert kept == ["commit", "commit"]

    with_peers(talk)


def test_transaction_that_fails_begins_no_job(works: dict[str, TestWork]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        for more in ({"type": "x-job", "data": job("j")}, {"type": "abort", "data": {}}):
            actions = [{"type": "x-job", "data": job("j")}, more]
            reply = await peer.ask("transaction", {"actions": actions})
            assert "error" in reply
            assert peer.take() == ["created", "aborting", "concluded", "null"]
        assert not daemon.jobs.all

    with_peers(talk)


@pytest.mark.parametrize(
    ("policy", "code", "action", "io_status"),
    [
        ("report", errno.EIO, "report", ""),
        ("ignore", errno.EIO, "ignore", ""),
        ("stop", errno.EIO, "stop", "failed"),
        ("stop", errno.ENOSPC, "stop", "nospace"),
        ("enospc", errno.EIO, "report", ""),
        ("enospc", errno.ENOSPC, "stop", "nospace"),
        ("auto", errno.ENOSPC, "stop", "nospace"),
    ],
)
def test_errors(
    policy: str, code: int, action: str, io_status: str, works: dict[str, TestWork]
) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        more = {"on_error": policy, "error": code, "auto_dismiss": False}
        await peer.ask("x-job", job(**more))
        event = await peer.told("BLOCK_JOB_ERROR")
        assert event["data"] == {"device": "j", "operation": "write", "action": action}
        if io_status:
            await peer.told(status="paused")
            (found,) = await peer.do("query-block-jobs")
            assert (found["io-status"], found["paused"]) == (io_status, True)
            await peer.do("job-resume", id="j")
        await peer.told(status="concluded")
        (found,) = await peer.do("query-block-jobs")
        assert found["io-status"] == "ok"
        assert found.get("error") == (None if action != "report" else "Input/output error")
        completed = next(e for e in peer.events if e["event"] == "BLOCK_JOB_COMPLETED")
        assert completed["data"].get("error") == found.get("error")

    with_peers(talk)


@pytest.mark.parametrize("where", ["run", "prepare", "commit"])
def test_a_defect_ends_the_job(
    where: str,
    works: dict[str, TestWork],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def broken(work: TestWork, job: Job) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(TestWork, where, broken)

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await peer.do("x-job", **job(auto_dismiss=False))
        await peer.told(status="concluded")
        (found,) = await peer.do("query-jobs")
        assert found["error"] == "internal error: KeyError: 'surprise'"
        await peer.do("job-dismiss", id="j")
        assert (await peer.ask("x-job", job("next")))["return"] == {}

    with_peers(talk)
    told = capsys.readouterr().err
    assert "job 'j': internal error" in told and "in broken" in told


def test_commands_wait_for_jobs_to_rest(works: dict[str, TestWork]) -> None:
    """A transaction is a moment in which no job is at work; they go on behind it."""

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await peer.ask("x-job", job(chunks=1000))
        await peer.ask("transaction", {"actions": []})
        found = daemon.jobs.all["j"]
        drain = daemon.draining_all()
        await drain.begin()
        before = found.done
        for _ in range(50):
            await daemon.driver.turn()
        assert found.done == before and found.status == "paused"
        drain.end()
        await peer.told("BLOCK_JOB_COMPLETED")

    with_peers(talk)


def test_client_that_hangs_up_leaves_the_job(works: dict[str, TestWork]) -> None:
    async def talk(daemon: Daemon, peer: Peer, other: Peer) -> None:
        await peer.meet()
        await other.meet()
        await peer.ask("x-job", job(ready=True, auto_dismiss=False))
        daemon.driver.forget(peer.sock.fileno())
        peer.sock.shutdown(2)
        await other.told("BLOCK_JOB_READY")
        await other.do("job-complete", id="j")
        await other.told(status="concluded")

    with_peers(talk, 2)


def test_the_end_of_the_daemon_ends_all_jobs(works: dict[str, TestWork]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await peer.ask("transaction", grouped(job("a"), job("b", **SLOW)))
        await peer.ask("x-job", job("c", ready=True))
        await peer.ask("x-job", job("d", auto_finalize=False))
        await peer.ask("x-job", job("e", auto_dismiss=False))
        await peer.ask("x-job", job("f", **SLOW))
        await peer.do("job-pause", id="f")
        await peer.told("BLOCK_JOB_PENDING")
        await peer.do("quit")

    with_peers(talk)
    ends = {id: work.log[-1] for id, work in works.items()}
    assert ends == {**dict.fromkeys("abcdf", "abort"), "e": "commit"}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["pause", "resume", "complete", "finalize", "dismiss", "cancel", "leave",
                         "set-speed", "turn", "turns"]),
        st.integers(0, 3),
    ),
    max_size=40,
)  # fmt: skip
SHAPE = st.tuples(
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0, 0, errno.EIO]),
    st.sampled_from(["report", "stop", "ignore"]), st.sampled_from([0, 1]), st.booleans(),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPE, min_size=2, max_size=3), st.booleans(), STEPS)
def test_any_verbs_in_any_order(
    shapes: list[tuple[Any, ...]], together: bool, steps: list[tuple[str, int]]
) -> None:
    """Verbs are accepted where the table says so, states follow each other as it says, and jobs of
    a group have one fate."""
    driver = Driver()
    history: dict[str, list[Status]] = {}
    outcome: dict[str, str] = {}

    def on_event(one: Job, what: str, more: Any) -> None:
        if what == "status":
            history.setdefault(one.id, ["undefined"]).append(one.status)
        elif what in ("completed", "cancelled"):
            assert one.id not in outcome
            outcome[one.id] = "ok" if one.error is None else "failed"

    jobs = Jobs(driver, on_event)

    async def main() -> None:
        group = Group() if together else None
        made = []
        for number, (ready, finalize, dismiss, error, policy, speed, bad) in enumerate(shapes):
            work = TestWork(2, ready, error, 1, 1, policy, bad)
            options = {"speed": speed, "auto_finalize": finalize, "auto_dismiss": dismiss}
            made.append(Job(jobs, f"j{number}", work, group=group, **options))
        for one in made:
            one.start()
        for verb, number in steps:
            one = made[number % len(made)]
            if verb in ("turn", "turns"):
                for _ in range(1 if verb == "turn" else 10):
                    await driver.turn()
                continue
            allowed = one.status in VERBS["cancel" if verb == "leave" else verb]
            if verb == "pause":
                allowed &= not one.paused
            if verb == "resume":
                allowed &= one.paused
            try:
                match verb:
                    case "set-speed":
                        one.set_speed(number)
                    case "leave":
                        one.cancel(force=False)
                    case _:
                        getattr(one, verb)()
            except jobs_module.UsageError:
                assert not allowed, (verb, one.status)
            else:
                assert allowed, (verb, one.status)
        await jobs.cancel_all()
        for one in made:
            assert one.status == "null"
            log = cast(TestWork, one.work).log
            assert log[-1] == ("commit" if outcome[one.id] == "ok" else "abort")
            assert log.count("commit") + log.count("abort") == 1

    try:
        driver.run(main())
    finally:
        driver.close()
    for states in history.values():
        for before, after in pairwise(states):
            assert after in NEXT[before], states
    if together:
        assert len(set(outcome.values())) == 1, outcome

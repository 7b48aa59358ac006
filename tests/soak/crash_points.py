"""llmux killed wherever it touches the outside world: ``python -m tests.soak.crash_points [SCENARIO …]``.

Random kills (``tests.soak.soak``) miss windows of a few microseconds; here each is a point of its own. A scenario
(``crash_scenarios``) is played once under strace, which writes down every system call of llmux, in all its
threads, that changes what others can see: a file made, written or renamed, a process started or signalled, bytes
sent. Then it is played for each of these calls, with SIGKILL at its entry: all calls before it have been made, it
and what follows have not. Which call that is differs a little from run to run: those that were missed are tried
again, and counted when they stay so.

Hooks outlive that llmux: once they go on at once, once they wait until it has been replaced. The next llmux
starts, and then: it is ready; none of the hooks of before runs; nothing has violated the lease on the pretended
GPU (``tests.harness``); the state file was not set aside; what an operator was told has been done is in force;
every model answers; TERM ends llmux with 0; no process and no draft of a file is left behind. ``--twice N`` kills
the second llmux, at every point of its own start, for N of the points of the first.

``gateway…`` kill a gateway before two hosts, with limits, a budget and a store (its own in ``gateway-embedded``):
what was told to be spent is spent afterwards, what was under way is charged no more than was reserved for it, the
store and the file say the same, and no store, socket or draft is left. ``store`` kills, and freezes, the store at
each of its answers instead: all requests are served, and counted exactly once.

Points are named by the call and its number in its thread: ``--at rename:3`` (``--then rename:1``) plays one again.
Exit code 0: no problem. Needs strace, and the right to trace (ptrace). 130 points take five minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.lease.raw import Gone
from tests.harness.waiting import PATIENCE
from tests.soak.crash_lab import CrashDoor, CrashLab, Point
from tests.soak.crash_scenarios import SCENARIOS, Scenario

TROUBLE = ("state_file_set_aside", "state_file_unreadable", "ledger_set_aside", "internal_error", "holder_unknown")
JOBS = 3  # played at a time


async def until_dead(lab: CrashLab) -> None:
    while lab.process is not None and lab.process.poll() is None:  # noqa: ASYNC110 - a process tells nothing
        await asyncio.sleep(0.005)
    lab.process = None


async def live(lab: CrashLab, scenario: Scenario) -> None:
    """Play it, until its end or llmux's. What fails because llmux was killed is no problem."""
    playing, dying = asyncio.create_task(scenario.play(lab)), asyncio.create_task(until_dead(lab))
    await asyncio.wait({playing, dying}, return_when=asyncio.FIRST_COMPLETED)
    if not playing.done() or playing.exception():
        await asyncio.wait({playing, dying}, timeout=1)  # one of them hears of it a moment later
    killed = dying.done()
    for task in (playing, dying):
        task.cancel()
    (failed, _) = await asyncio.gather(playing, dying, return_exceptions=True)
    if isinstance(failed, Exception) and not killed:
        raise failed


async def case(lab: CrashLab, scenario: Scenario, first: Point | None, *more: Point | None, wait: bool) -> None:
    """Play a life until it is killed at ``first``, perhaps others, and look at the next. AssertionError."""
    await asyncio.to_thread(scenario.write, lab)
    lab.check_holding = scenario.check_holding
    if scenario.traces_store:
        await store_case(lab, scenario, first, frozen=wait)
        return
    if await asyncio.to_thread(lab.start_traced, first):
        await live(lab, scenario)
    await asyncio.to_thread(lab.dead, orphans_wait=wait)
    await asyncio.sleep(0 if wait else 0.3)
    for second in more:
        await asyncio.to_thread(lab.start_traced, second)
        await asyncio.to_thread(lab.dead, orphans_wait=wait)
    before = lab.others()
    await asyncio.to_thread(lab.start)
    left = before & lab.others()
    assert not left, f"still runs: {[c for p, c in lab.processes() if p in dict(left)]}"
    lab.release("all")
    (lab.root / "ctl" / "go").touch()
    await scenario.check(lab)
    for model in lab.serves:
        answer = await lab.chat(model, headers=scenario.headers)
        until = time.monotonic() + PATIENCE
        while scenario.fails and answer.status == 503 and time.monotonic() < until:
            await asyncio.sleep(0.1)
            answer = await lab.chat(model, headers=scenario.headers)
        assert answer.status == 200, f"{model}: {answer.status} {answer.body!r}"
    await asyncio.to_thread(lab.finish)
    found = [word for word in TROUBLE if word in lab.log]
    assert not found, f"{found} in the log:\n{lab.log}"
    assert not lab.drafts(), lab.drafts()
    await scenario.ended(lab)


async def store_case(lab: CrashLab, scenario: Scenario, kill: Point | None, *, frozen: bool) -> None:
    """Kill or freeze the store at a point, and have the gateway go on. AssertionError."""
    assert isinstance(lab, CrashDoor)
    assert lab.store is not None
    await asyncio.to_thread(lab.start)
    store = lab.store.process
    await asyncio.to_thread(lab.trace, store.pid, kill, "STOP" if frozen else "KILL")
    await scenario.play(lab)  # all of it is served, whatever becomes of the store
    if kill is not None and not frozen:
        store.kill()
        lab.store.restart()
    assert lab.tracer is not None
    lab.tracer.terminate()
    await asyncio.to_thread(lab.tracer.wait, PATIENCE)
    lab.store.go_on()
    await scenario.check(lab)
    await asyncio.to_thread(lab.finish)
    await scenario.ended(lab)


class Explorer:
    """Plays one scenario at all its points."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder
        self.played = 0
        self.problems: list[str] = []
        self._room = asyncio.Semaphore(JOBS)

    async def play(self, *kills: Point | None, wait: bool, site: str = "") -> dict[str, Point]:
        """Play it once; return what was done in the last life that was to be killed."""
        async with self._room:
            self.played += 1
            lab = self.scenario.laboratory(self.folder / f"{self.played}")
            done: dict[str, Point] = {}
            try:
                async with asyncio.timeout(3 * PATIENCE):
                    await case(lab, self.scenario, *kills, wait=wait)
                done = lab.sites(len(kills))
                if self.scenario.traces_store:  # it answers the same again and again: it is the number that counts
                    last = kills[-1] and str(kills[-1])
                    done = {str(each): each._replace(cut=str(each) == last) for each in done.values()}
                shutil.rmtree(lab.root, ignore_errors=True)
            except (AssertionError, OSError, Gone, TimeoutError, KeyError, ValueError, ExceptionGroup) as error:
                where = " then ".join(str(kill or "the end") for kill in kills)
                text = f"{self.scenario.name} at {where} {site} (orphans {'wait' if wait else 'go on'})"
                self.problems.append(f"{text}: {type(error).__name__}: {str(error)[:2000]}\n  {lab.root}")
                print(self.problems[-1], flush=True)
                with contextlib.suppress(OSError):
                    done = lab.sites(len(kills)) if kills[-1] else {}  # what fails without a kill is not explored
            finally:
                lab.clear()
            return done

    async def cover(self, *before: Point) -> tuple[int, int]:
        """Play it at each point, with both kinds of orphans; return how many there are, and were missed."""
        sites = await self.play(*before, None, wait=True)
        left = {(site, wait) for site in sites for wait in self.scenario.kinds}

        async def at(site: str, wait: bool, more: int) -> None:
            kill = sites[site]._replace(number=max(1, sites[site].number + more))
            done = await self.play(*before, kill, wait=wait, site=site)
            left.difference_update((one, wait) for one, found in done.items() if found.cut)

        for more in (0, 0, 1, -1):  # what comes before it may have taken another number of calls
            await asyncio.gather(*(at(*each, more) for each in sorted(left)))
        return len(sites), len(left)

    async def explore(self) -> None:
        """Kill one llmux."""
        sites, missed = await self.cover()
        print(
            f"{self.scenario.name}: {sites} points, each in {len(self.scenario.kinds)} ways; {missed} missed;"
            f" {self.played} runs; {len(self.problems)} problems",
            flush=True,
        )

    async def explore_again(self, firsts: int) -> None:
        """Kill one llmux at so many points, and the next one at each point of its start."""
        for number in range(firsts):
            points = list((await self.play(None, wait=True)).values())
            first = points[(2 * number + 1) * len(points) // (2 * firsts)]
            again, missed = await self.cover(first)
            print(
                f"{self.scenario.name}, killed at {first}: {again} points of the next start; {missed} missed;"
                f" {len(self.problems)} problems",
                flush=True,
            )


async def run(options: argparse.Namespace, folder: Path) -> int:
    problems = 0
    for name in options.scenario or SCENARIOS:
        explorer = Explorer(SCENARIOS[name], folder / name)
        if options.at:
            kills = [options.at, options.then] if options.then else [options.at]
            await explorer.play(*kills, wait=not options.go_on)  # its folder stays where there is a problem
        else:
            await (explorer.explore_again(options.twice) if options.twice else explorer.explore())
        problems += len(explorer.problems)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; all")
    parser.add_argument(
        "--twice", type=int, default=0, metavar="N", help="kill the second llmux, after N of the points"
    )
    parser.add_argument("--at", type=Point.of, metavar="CALL:N", help="this point only")
    parser.add_argument("--then", type=Point.of, metavar="CALL:N", help="and then this point of the second llmux")
    parser.add_argument("--go-on", action="store_true", help="with --at: orphaned hooks do not wait")
    options = parser.parse_args()
    if unknown := set(options.scenario) - SCENARIOS.keys():
        parser.error(f"no such scenario: {', '.join(unknown)}")
    folder = Path(tempfile.mkdtemp(prefix="llmux-crash-"))
    if asyncio.run(run(options, folder)):
        sys.exit(f"what happened is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""What ends a training process before its last step: signals, the death of another process, hanging.

While the main thread waits for other processes, inside a collective, no handler of Python runs and no
exception reaches it. So threads do all of this.

    SIGTERM, Ctrl-C        the step is finished and saved, then the run ends
    Ctrl-C once more       ends at once, and so does the first one before there is anything to save
    a process that dies    the others end within seconds, and one of them says which one it was
    a phase that lasts     ends the process, with a line that says where all of them are
"""
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

from run.processes import gather
from trust.program import INTERRUPTED, end, say

# Seconds in which processes that all end by themselves have ended.
GRACE = 3
# Seconds in which processes of one run reach each other. A firewall costs so many at the start.
CONNECTING = 60


# ---- the guard -------------------------------------------------------------------------------------
@contextmanager
def guard(watch, out: str, minutes: float, rank: int, world: int):
    """Inside, this process ends as the head of this file says. All processes have to enter together.

    watch    sees the phases, and is told of requests to stop
    minutes  the longest phase
    """
    over = threading.Event()
    peers = connect(rank, world)
    signals, woken = socket.socketpair()
    threads = [
        threading.Thread(target=heed, args=(signals, watch, rank), daemon=True),
        threading.Thread(target=look_for_deaths, args=(peers, over, rank, world), daemon=True),
        threading.Thread(target=look_for_hanging, args=(watch, over, out, minutes, rank, world), daemon=True),
    ]
    woken.setblocking(False)
    # Python writes the number of each signal there, whatever the main thread does.
    before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, nothing) for number in (signal.SIGTERM, signal.SIGINT)}
    for thread in threads:
        thread.start()
    try:
        yield
        send(peers, world)
    except RuntimeError:
        # A collective fails when another process dies. The thread that knows which one ends this process.
        if world > 1:
            time.sleep(2 * GRACE)
        raise
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        woken.shutdown(socket.SHUT_RDWR)
        for peer in peers:
            # Ends the thread that listens. close alone would not.
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


def nothing(*_) -> None:
    """A handler for signals that a thread heeds."""


# ---- signals ---------------------------------------------------------------------------------------
def heed(signals: socket.socket, watch, rank: int) -> None:
    """Tells the watch of SIGTERM and Ctrl-C. A thread, which ends when nobody can write to `signals`."""
    interrupts = 0
    while number := signals.recv(1):
        if number[0] == signal.SIGTERM:
            watch.stop_requested = True
        elif number[0] == signal.SIGINT:
            interrupts += 1
            if watch.phase == "start":
                end(INTERRUPTED, "interrupted before the first step")
            if interrupts > 1:
                end(INTERRUPTED, "interrupted twice: the same command continues from the newest checkpoint")
            watch.stop_requested = True
            if rank == 0:
                say("interrupted: the step is finished and saved; Ctrl-C once more ends at once")
    signals.close()


# ---- the death of another process ------------------------------------------------------------------
def connect(rank: int, world: int) -> dict:
    """{socket: rank of the process at its other end}: rank 0 and each other process are connected.

    The system closes a socket when its process dies. Those that cannot be reached are not watched.
    """
    if world == 1:
        return {}
    peers = {}
    host, server = listen(world) if rank == 0 else ("", None)
    address = gather(server and (host, server.getsockname()[1]))[0]
    with suppress(OSError):
        if rank > 0:
            peer = socket.create_connection(address, CONNECTING)
            peers[peer] = 0
            send(peers, rank)
        while rank == 0 and len(peers) < world - 1:
            server.settimeout(CONNECTING)
            peer, _ = server.accept()
            peer.settimeout(CONNECTING)
            other = receive(peer)
            # Anybody could have come in.
            if other in range(1, world):
                peers[peer] = other
    if server:
        server.close()
    for peer in peers:
        peer.settimeout(None)
    return peers


def listen(world: int) -> tuple[str, socket.socket]:
    """(host, server): where the other processes reach rank 0. On one node, nobody from outside does."""
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        return "127.0.0.1", socket.create_server(("127.0.0.1", 0))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return os.environ["MASTER_ADDR"], socket.create_server(("", 0), family=family, dualstack_ipv6=dual)


def send(peers, number: int) -> None:
    for peer in peers:
        with suppress(OSError):
            peer.sendall(number.to_bytes(4, "big"))


def receive(peer: socket.socket) -> int | None:
    """A number that the process at the other end sent. None if there is no such process any more."""
    with suppress(OSError):
        number = peer.recv(4, socket.MSG_WAITALL)
        if len(number) == 4:
            return int.from_bytes(number, "big")
    return None


def look_for_deaths(peers: dict, over: threading.Event, rank: int, world: int) -> None:
    """Ends this process some seconds after another one has died. A thread.

    Processes send `world` when they are done, and rank 0 sends the rank of one that has died.
    """
    watched = dict(peers)
    while watched:
        for peer in wait(list(watched)):
            other = watched.pop(peer)
            number = receive(peer)
            if number == world:
                continue
            if over.is_set():
                return
            lost = other if number is None else number
            send(watched, lost)
            # Where all processes end with an error of their own, that error is what counts.
            if not over.wait(GRACE):
                say_death(lost, rank, world)


def say_death(lost: int, rank: int, world: int) -> None:
    """Ends this process. The first one that is left says why."""
    if rank == (1 if lost == 0 else 0):
        end(1, f"error: rank {lost} (of {world}) has died, or ended with an error of its own; "
               f"the same command continues from the newest checkpoint")
    os._exit(1)


# ---- hanging ---------------------------------------------------------------------------------------
def look_for_hanging(watch, over: threading.Event, out: str, minutes: float, rank: int, world: int) -> None:
    """Ends this process when a phase of the `watch` lasts longer than `minutes`. A thread.

    If one process hangs, all others wait silently. Each writes its phase to OUT/phases/RANK, so that the
    first one to end, often the one that hangs, can say where the others are.
    """
    folder = Path(out, "phases")
    while not over.wait(min(10.0, 6 * minutes)):
        phase = f"{watch.phase} of step {watch.step}"
        # A full disk is no reason to stop here.
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Under another name first: others may read at this moment.
            new = folder / f"{rank}.new"
            new.write_text(phase)
            new.replace(folder / str(rank))
        if time.perf_counter() - watch.last > 60 * minutes:
            others = phases_of_others(folder, rank, world)
            end(1, f"error: rank {rank} (of {world}) has been in {phase} for {minutes:g} minutes; "
                   f"the others: {others}")


def phases_of_others(folder: Path, rank: int, world: int) -> str:
    """What the other processes last wrote of their phases."""
    phases = []
    for other in range(world):
        # A process may have written nothing yet.
        with suppress(OSError):
            if other != rank:
                phases.append(f"rank {other} {(folder / str(other)).read_text()}")
    return ", ".join(phases) or "none"

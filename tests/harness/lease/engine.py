# One small program that has to start quickly:
# ruff: noqa: ASYNC110, ASYNC240, C901, PLR0912, PTH105, PTH108, PTH110, PTH119, PTH120, PTH123, PTH208
"""Fake engines on a fake GPU, for black-box tests of llmux.

``python -I -S engine.py FIFO`` forks them, each in a session of its own, when ``hook.sh`` requests one with a line
in the FIFO: importing asyncio takes longer than an engine's work in most tests. It ends when its standard input
does. While awake an engine holds a lease (a file in ``$LAB/gpu``, taken under a lock); USR1 puts it to sleep, USR2
wakes it, TERM ends it. What must never happen goes to ``$LAB/journal.jsonl`` as a *violation*: two holders at
once, a request to a sleeping engine, sleep with requests in flight, a model that is not this engine's.

The request header ``X-Do`` (JSON) determines the response; without it the response describes the request.

  delay        seconds before the first byte         hold      wait for $LAB/ctl/release.NAME, too
  sse          number of events to stream             interval    seconds between them
  hold_after   [k, NAME]: after k events wait for a release
  sse_body     the events as one body with Content-Length
  status, headers, body (base64), chunks ([base64, …], sent chunked), close (say and do Connection: close)
  raw          [base64, …] written to the connection as they are; raw_close closes it afterwards
  fail         crash | reset | eof, with fail_after = number of events (none: before the headers)
  partial      with fail: half an event was sent before it
  early        answer with this status as soon as the head is there, read no body, close
  ws_close     close the WebSocket after this many seconds
  flood        so many MiB of body, chunked
  drop_next    the next request on this connection is answered by closing it
  ws_refuse    answer an upgrade with this status     greeting    bytes sent right behind the 101
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import gc
import hashlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time

LAB = KEY = ""
NAMES: set[str] = set()
CAPACITY = SIZE = 1
IDLE_CLOSE = 0.0


def journal(event: str, **more: object) -> None:
    line = json.dumps({"t": time.time(), "key": KEY, "ev": event, **more}) + "\n"
    fd = os.open(f"{LAB}/journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line.encode())
    os.close(fd)


def violation(what: str, **more: object) -> None:
    journal("violation", what=what, **more)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def gpu():
    with open(f"{LAB}/gpu/.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def acquire() -> None:
    with gpu():
        used, others = 0, []
        for name in os.listdir(f"{LAB}/gpu"):
            if name in (".lock", KEY):
                continue
            with open(f"{LAB}/gpu/{name}", encoding="ascii") as file:
                pid, size = map(int, file.read().split())
            if alive(pid):
                used += size
                others.append(name)
        if used + SIZE > CAPACITY:
            violation("two holders", others=others)
        write(f"{LAB}/gpu/{KEY}", f"{os.getpid()} {SIZE}")
    journal("awake")


def release() -> None:
    with gpu(), contextlib.suppress(FileNotFoundError):
        os.unlink(f"{LAB}/gpu/{KEY}")


def write(path: str, text: str) -> None:
    draft = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{os.getpid()}"
    if "/gpu/" in path:
        draft = f"{LAB}/run/.{os.path.basename(path)}.{os.getpid()}"
    with open(draft, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(draft, path)


class Engine:
    def __init__(self) -> None:
        self.awake = False
        self.serving: set[Connection] = set()
        self.server: asyncio.Server | None = None

    async def run(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=1024)
        self.over: asyncio.Future[None] = loop.create_future()
        loop.add_signal_handler(signal.SIGUSR2, self.wake)
        loop.add_signal_handler(signal.SIGUSR1, lambda: loop.call_later(0.02, self.soon, self.sleep))
        loop.add_signal_handler(signal.SIGTERM, lambda: loop.call_later(0.02, self.end))
        self.wake()
        await self.over

    def soon(self, act) -> None:
        """Act once the closed connections that the kernel knows of have been taken note of."""
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, act)

    def wake(self) -> None:
        if not self.awake:
            acquire()
            self.awake = True
        write(f"{LAB}/run/{KEY}.state", "awake")

    def sleep(self) -> None:
        if self.awake:
            if self.serving:
                violation("sleep in flight", paths=[c.path for c in self.serving])
            self.awake = False
            release()
            journal("asleep")
        write(f"{LAB}/run/{KEY}.state", "asleep")

    def end(self) -> None:
        self.sleep()
        if not self.over.done():
            self.over.set_result(None)


class Connection(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.buffer = bytearray()
        self.task: asyncio.Task[None] | None = None
        self.echoing = False
        self.drop = False
        self.uid = ""
        self.path = ""
        self.open = asyncio.Event()
        self.open.set()
        self.number = 0
        self.idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pause_writing(self) -> None:
        self.open.clear()

    def resume_writing(self) -> None:
        self.open.set()

    def connection_lost(self, _error) -> None:
        self.open.set()
        if self.idle:
            self.idle.cancel()
        if self in self.engine.serving:
            self.engine.serving.discard(self)
            journal("gone", uid=self.uid, path=self.path)
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        if self.drop:
            journal("dropped", bytes=len(data))
            self.transport.abort()
            return
        if self.echoing:
            self.transport.write(data)
            return
        self.buffer += data
        self.next()

    def next(self) -> None:
        if self.task or self.transport.is_closing():
            return
        head, found, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        fields = [(n.lower(), v.strip()) for n, _, v in (line.partition(":") for line in lines[1:])]
        headers = dict(fields)
        do = json.loads(headers.get("x-do") or "{}")
        if do.get("early"):
            self.early(do["early"], headers.get("x-uid", ""))
            return
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body, used = dechunk(rest)
            if used < 0:
                return
        else:
            used = int(headers.get("content-length", 0))
            if len(rest) < used:
                return
            body = rest[:used]
        if self.idle:
            self.idle.cancel()
            self.idle = None
        self.buffer = bytearray(rest[used:])
        self.number += 1
        self.uid = headers.get("x-uid", "")
        self.path = lines[0]
        self.engine.serving.add(self)
        journal("request", uid=self.uid, path=self.path, pid=os.getpid())
        if not self.engine.awake:
            violation("request while asleep", path=self.path)
        self.task = asyncio.get_running_loop().create_task(self.answer(lines[0], fields, head, body))
        self.task.add_done_callback(self.answered)

    def answered(self, task) -> None:
        self.task = None
        self.engine.serving.discard(self)
        if not task.cancelled():
            if task.exception():
                violation("engine error", error=repr(task.exception()))
                self.transport.abort()
                return
            journal("done", uid=self.uid)
        if IDLE_CLOSE and not self.echoing:
            self.idle = asyncio.get_running_loop().call_later(IDLE_CLOSE, self.transport.close)
        if not self.echoing:
            self.next()

    def early(self, status: int, uid: str) -> None:
        """Answer before the body has come, and read no more of it."""
        journal("early", uid=uid)
        self.transport.pause_reading()
        self.transport.write(b"HTTP/1.1 %d No\r\nConnection: close\r\nContent-Length: 5\r\n\r\nearly" % status)
        self.buffer.clear()
        asyncio.get_running_loop().call_later(0.3, self.transport.close)

    async def send(self, data: bytes) -> None:
        self.transport.write(data)
        await self.open.wait()

    def fail(self, how: str) -> None:
        journal("fail", how=how, uid=self.uid)
        if how == "crash":
            os._exit(9)
        if how == "reset":
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    async def answer(self, line: str, fields: list[tuple[str, str]], head: bytes, body: bytes) -> None:
        headers = dict(fields)
        do = json.loads(headers.get("x-do") or "{}")
        method, target, _ = line.split(" ", 2)
        model = None
        if body[:1] == b"{":
            with contextlib.suppress(ValueError, RecursionError):
                model = json.loads(body).get("model")
        if model is not None and model not in NAMES and not do.get("any_model"):
            violation("wrong model", model=model, mine=sorted(NAMES))
        if do.get("delay"):
            await asyncio.sleep(do["delay"])
        if do.get("hold"):
            await released(do["hold"])
        if do.get("drop_next"):
            self.drop = True
        if headers.get("upgrade", "").lower() == "websocket" and not do.get("ws_refuse"):
            await self.upgrade(headers, do)
        elif do.get("ws_refuse"):
            await self.send(
                b"HTTP/1.1 %d No\r\nX-Engine: %s\r\nContent-Length: 7\r\n\r\nrefused"
                % (do["ws_refuse"], KEY.encode())
            )
        elif do.get("fail") and do.get("fail_after") is None:
            self.fail(do["fail"])
        elif "raw" in do:
            for part in do["raw"]:
                await self.send(base64.b64decode(part))
                await asyncio.sleep(do.get("interval", 0))
            if do.get("raw_close"):
                self.transport.close()
        elif "sse" in do:
            await self.stream(target, do)
        elif "flood" in do:
            await self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for n in range(do["flood"] * 16):
                await self.send(b"10000\r\n" + bytes(65536) + b"\r\n")
                if n % 160 == 0:
                    journal("flood", sent=n * 65536)
            await self.send(b"0\r\n\r\n")
        else:
            await self.plain(method, target, head, body, model, do)

    async def upgrade(self, headers: dict[str, str], do: dict) -> None:
        journal("websocket", uid=self.uid)
        key = headers.get("sec-websocket-key", "") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
        self.echoing = True
        early, self.buffer = bytes(self.buffer), bytearray()
        await self.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: "
            + accept
            + b"\r\nX-Engine: "
            + KEY.encode()
            + b"\r\n\r\n"
            + do.get("greeting", "").encode()
            + early
        )
        await asyncio.sleep(do.get("ws_close", 1e6))  # or until the connection is lost
        self.transport.close()

    async def plain(self, method: str, target: str, head: bytes, body: bytes, model: object, do: dict) -> None:
        if "chunks" in do:
            out = [b"HTTP/1.1 %d OK" % do.get("status", 200), b"Transfer-Encoding: chunked"]
            out += [f"{n}: {v}".encode("latin-1") for n, v in do.get("headers", [])]
            await self.send(b"\r\n".join(out) + b"\r\n\r\n")
            for part in do["chunks"]:
                data = base64.b64decode(part)
                await self.send(b"%x\r\n" % len(data) + data + b"\r\n")
                await asyncio.sleep(do.get("interval", 0))
            await self.send(b"0\r\n\r\n")
            return
        if "body" in do:
            data, kind = base64.b64decode(do["body"]), None
        else:
            data, kind = json.dumps(describe(method, target, head, body, model)).encode(), "application/json"
        out = [b"HTTP/1.1 %d OK" % do.get("status", 200)]
        if kind:
            out.append(f"Content-Type: {kind}".encode())
        out += [f"{n}: {v}".encode("latin-1") for n, v in do.get("headers", [])]
        if do.get("close"):
            out.append(b"Connection: close")
        out.append(b"Content-Length: %d" % len(data))
        await self.send(b"\r\n".join(out) + b"\r\n\r\n" + (b"" if method == "HEAD" else data))
        if do.get("close"):
            self.transport.close()

    async def stream(self, target: str, do: dict) -> None:
        events = list(anthropic(do["sse"]) if target.startswith("/v1/messages") else openai(do["sse"]))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        if do.get("sse_body"):
            whole = b"".join(events)
            await self.send(head + b"Content-Length: %d\r\n\r\n" % len(whole))
        else:
            await self.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
        hold_after, hold = do.get("hold_after", [None, None])
        for i, event in enumerate(events):
            if do.get("fail") and i == do["fail_after"]:
                if do.get("partial"):
                    await self.send(
                        event[: len(event) // 2] if do.get("sse_body") else b"%x\r\n" % len(event) + event[:9]
                    )
                await asyncio.sleep(0.01)
                self.fail(do["fail"])
                return
            if i == hold_after:
                await released(hold)
            await self.send(event if do.get("sse_body") else b"%x\r\n" % len(event) + event + b"\r\n")
            if do.get("interval"):
                await asyncio.sleep(do["interval"])
        if not do.get("sse_body"):
            await self.send(b"0\r\n\r\n")


async def released(name: str) -> None:
    while not os.path.exists(f"{LAB}/ctl/release.{name}"):
        await asyncio.sleep(0.005)


def dechunk(data: bytes) -> tuple[bytes, int]:
    out, at = b"", 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return b"", -1
        size = int(data[at:end].split(b";")[0], 16)
        if len(data) < end + 4 + size:
            return b"", -1
        out += data[end + 2 : end + 2 + size]
        at = end + 4 + size
        if size == 0:
            return out, at


def describe(method: str, target: str, head: bytes, body: bytes, model: object) -> dict:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model if isinstance(model, str) else KEY,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": KEY}, "finish_reason": "stop"}],
        "engine": KEY,
        "pid": os.getpid(),
        "method": method,
        "target": target,
        "head": base64.b64encode(head).decode(),
        "body_sha256": hashlib.sha256(body).hexdigest(),
        "body_size": len(body),
        "body": base64.b64encode(body).decode() if len(body) < 65536 else None,
    }


def openai(count: int):
    for i in range(count):
        chunk = {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": KEY,
            "choices": [{"index": 0, "delta": {"content": f"t{i} "}, "finish_reason": None}],
        }
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def anthropic(count: int):
    def event(kind: str, **data: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()

    message = {
        "id": "m", "type": "message", "role": "assistant", "content": [], "model": KEY,
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    yield event("message_start", message=message)
    yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for i in range(count):
        yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": f"t{i} "})
    yield event("content_block_stop", index=0)
    yield event(
        "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 1}
    )
    yield event("message_stop")


def become(lab: str, key: str, names: str, capacity: str, size: str, idle_close: str) -> None:
    """Be the engine of this model, in this laboratory."""
    global LAB, KEY, NAMES, CAPACITY, SIZE, IDLE_CLOSE
    LAB, KEY, NAMES = lab, key, set(filter(None, names.split(",")))
    CAPACITY, SIZE, IDLE_CLOSE = int(capacity), int(size), float(idle_close)
    os.setsid()
    log = os.open(f"{LAB}/log/{KEY}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def buried(*_: object) -> None:
    """Reap what has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def start(port: str, lab: str, key: str, *more: str) -> None:
    """Fork an engine, and write down its number before its hook goes on."""
    if not (pid := os.fork()):
        code = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            become(lab, key, *more)
            asyncio.run(Engine().run(int(port)))
            code = 0
        except Exception:  # noqa: BLE001
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):  # its laboratory may have gone
        with open(f"{lab}/run/.{key}.new", "w", encoding="ascii") as file:
            file.write(f"{pid}\n")
        os.replace(f"{lab}/run/.{key}.new", f"{lab}/run/{key}.pid")


def main(fifo: str) -> None:
    """Fork engines until standard input ends."""
    signal.signal(signal.SIGCHLD, buried)
    orders = os.open(fifo, os.O_RDWR)
    gc.collect()
    gc.freeze()
    unread = b""
    while orders in select.select([orders, 0], [], [])[0]:
        *lines, unread = (unread + os.read(orders, 65536)).split(b"\n")
        for line in lines:
            *order, run = line.decode().split("\t")
            if order:
                start(*order)
            with contextlib.suppress(OSError):
                os.unlink(f"{run}.asked")


if __name__ == "__main__":
    main(sys.argv[1])

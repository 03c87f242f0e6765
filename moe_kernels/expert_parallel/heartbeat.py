# SPDX-License-Identifier: Apache-2.0
"""Who is alive: a connection between every two ranks, apart from the one that carries rows, served by a thread.

The kernel closes the connections of a process that ends, so its death is seen at once. A stopped process is seen by its
silence when the others ask. A frame says how many exchanges a rank has entered, whether it failed, and whom it blames;
a failed rank says so before it lets go of anything, so that survivors do not blame each other.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import threading
import time
from datetime import timedelta
from typing import Any

from .faults import MoECommError

_FRAME = struct.Struct("!4siiiq")
_REASONS = ("process", "heartbeat", "absent", "transport", "error")
_MAGIC = b"MoEh"
BEAT, BYE, FAILED = 0, 1, 2


class Peer:
    """What is known of another rank."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.read, self.unsent = connection, b"", b""
        self.heard, self.entered, self.state, self.suspect, self.gone = time.monotonic(), 0, BEAT, -1, False
        self.reason = "transport"


class Heartbeat:
    """Connects to all ranks over a store, then answers for this rank until `close`.

    Ranks are positions in the group here. timeouts: of an exchange, and of connecting. entered: exchanges that this
    rank has begun, set by the link.
    """

    def __init__(self, store: Any, position: int, ranks: list[int], timeouts: tuple[float, float], host: str) -> None:
        timeout, patience = timeouts
        self.position, self.ranks, self.entered = position, ranks, 0
        self.state, self.suspect, self.reason = BEAT, -1, "transport"
        self.interval, self.grace = min(0.5, timeout / 8), min(0.6, timeout / 4)
        self._lock, self._open = threading.Lock(), True
        self.peers = _connect(store, position, ranks, patience, host)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="moe_kernels heartbeat", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for at, peer in self.peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, at)
            due = 0.0
            while self._open:
                if time.monotonic() >= due:
                    self.tell()
                    due = time.monotonic() + self.interval
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if key.data is not None and not self._hear(self.peers[key.data]):
                        selector.unregister(key.fileobj)

    def _hear(self, peer: Peer) -> bool:
        """Reads what came; False once the connection is over."""
        try:
            data = peer.connection.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        peer.read += data
        asked = False
        while len(peer.read) >= _FRAME.size:
            magic, state, suspect, reason, entered = _FRAME.unpack_from(peer.read)
            peer.read = peer.read[_FRAME.size :]
            if magic != _MAGIC or not (-1 <= suspect < len(self.ranks) and 0 <= reason < len(_REASONS)):
                data = b""
                break
            asked |= state == FAILED and peer.state != FAILED
            peer.entered, peer.heard = max(peer.entered, entered), time.monotonic()
            peer.state, peer.suspect, peer.reason = max(peer.state, state), suspect, _REASONS[reason]
        if asked:  # a roll call: answer now
            self.tell()
        if not data:
            peer.gone = True
        return bool(data)

    def tell(self, state: int = BEAT, suspect: int = -1, reason: str = "") -> None:
        """Sends every rank a frame; one that does not read gets none. What was said once stays said."""
        with self._lock:
            self.state = max(state, self.state)
            self.suspect = self.suspect if suspect < 0 else suspect
            self.reason = reason or self.reason
            frame = _FRAME.pack(_MAGIC, self.state, self.suspect, _REASONS.index(self.reason), self.entered)
            for peer in self.peers.values():
                if peer.gone:
                    continue
                peer.unsent = peer.unsent + frame if len(peer.unsent) < 2 * _FRAME.size else peer.unsent
                try:
                    peer.unsent = peer.unsent[peer.connection.send(peer.unsent, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    pass
                except OSError:
                    pass  # the thread reads the end of this connection

    def ended(self) -> list[int]:
        """Positions of ranks whose process is gone, without a word before."""
        return [at for at, peer in self.peers.items() if peer.gone and peer.state == BEAT]

    def alarm(self) -> bool:
        """Whether a rank is gone or has said that it failed: waiting for it is of no use."""
        return any(peer.gone or peer.state != BEAT for peer in self.peers.values())

    def culprit(self, own: bool = True) -> tuple[int, str, str]:
        """Asks everybody and waits a little: (position, field, why) of the rank that an exchange failed for.

        own: this rank's end of the connection reported an error; else it has only waited too long.
        """
        began = time.monotonic()
        self.tell(FAILED)
        while True:
            found = self._certain()
            if found is not None or time.monotonic() > began + self.grace:
                break
            time.sleep(0.005)
        found = found or self._likely(began, own)
        self.tell(FAILED, found[0], found[1])
        return found

    def _certain(self) -> tuple[int, str, str] | None:
        if ended := self.ended():
            return ended[0], "process", "its process has ended"
        for at, peer in self.peers.items():
            if peer.state == FAILED and peer.suspect >= 0:
                why = "it failed and said so" if peer.suspect == at else f"so rank {self.ranks[at]} found"
                return peer.suspect, peer.reason, why
        for at, peer in self.peers.items():
            if peer.state == BYE:
                return at, "process", "it has left the group"
        return None

    def _likely(self, began: float, own: bool) -> tuple[int, str, str]:
        def progress(at: int) -> tuple[int, float]:
            return self.peers[at].entered, self.peers[at].heard

        silent = [at for at, peer in self.peers.items() if peer.heard < began]
        if silent:
            worst = min(silent, key=progress)
            return worst, "heartbeat", f"silent for {time.monotonic() - self.peers[worst].heard:.1f} s"
        behind = [at for at, peer in self.peers.items() if peer.entered < self.entered]
        if behind:
            worst = min(behind, key=progress)
            return worst, "absent", f"it lives but is at exchange {self.peers[worst].entered}, not {self.entered}"
        if own:
            return self.position, "transport", "all ranks live and came; its connection to them failed"
        first = min([self.position, *(at for at, peer in self.peers.items() if peer.state == FAILED)])
        return first, "transport", "all ranks live and came, and the rows did not; it stands for all that waited"

    def close(self, farewell: bool = True) -> None:
        """Ends the thread and the connections. Without a farewell in a forked child, whose thread does not exist."""
        if not self._open:
            return
        self._open = False
        if farewell:
            self.tell(BYE)
            self._wake.send(b"x")
            if threading.current_thread() is not self._thread:
                self._thread.join(2.0)
        for connection in (self._wake, self._woken, *(peer.connection for peer in self.peers.values())):
            connection.close()


def _connect(store: Any, position: int, ranks: list[int], timeout: float, host: str) -> dict[int, Peer]:
    """A connection to every other rank: this one calls those before it and is called by those after it.

    A caller shows a secret out of the store, so that no stranger is taken for a rank.
    """
    deadline = time.monotonic() + timeout
    with socket.create_server((host, 0), backlog=len(ranks)) as server:
        if position == 0:
            store.set("secret", secrets.token_hex(16))
        store.set(f"address{position}", f"{host} {server.getsockname()[1]}")
        secret = wait(store, "secret", 0, ranks, deadline)
        found: dict[int, socket.socket] = {}
        try:
            for at in range(position):
                to, port = wait(store, f"address{at}", at, ranks, deadline).decode().split()
                caller = socket.create_connection((to, int(port)), timeout=max(0.1, deadline - time.monotonic()))
                caller.sendall(secret + position.to_bytes(4, "big"))
                found[at] = caller
            while len(found) < len(ranks) - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                caller, _ = server.accept()
                caller.settimeout(max(0.1, deadline - time.monotonic()))
                word = _read(caller, len(secret) + 4)
                at = int.from_bytes(word[len(secret) :], "big")
                if word[: len(secret)] != secret or not position < at < len(ranks) or at in found:
                    caller.close()
                    continue
                found[at] = caller
        except OSError as error:
            for connection in found.values():
                connection.close()
            missing = next((at for at in range(len(ranks)) if at != position and at not in found), position)
            raise MoECommError(ranks[missing], "heartbeat", "connect", f"no connection to it: {error}") from error
    for connection in found.values():
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {at: Peer(found[at]) for at in sorted(found)}


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data.ljust(size, b"\0")


def wait(store: Any, key: str, at: int, ranks: list[int], deadline: float) -> bytes:
    """A value of the store that the rank at that position sets."""
    try:
        store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        return bytes(store.get(key))
    except RuntimeError as error:
        raise MoECommError(ranks[at], "process", "connect", f"it did not come: {error}") from error

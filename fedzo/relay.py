"""A TCP relay on loopback that counts the bytes between a node and its SuperLink, and can cut them off."""

import asyncio
import socket
import struct
import threading
from contextlib import suppress

_CHUNK = 2**16


class Relay:
    """Passes connections on to a port of this machine, in a thread of its own.

    Args:
        target: the port.

    Attributes:
        port: where it listens.
        up, down: bytes to and from the target.
        open: False: connections are closed at once, and none is made.
    """

    def __init__(self, target: int) -> None:
        self.up = self.down = self.port = 0
        self.open = True
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def cut(self) -> None:
        """Closes what is open, and lets nothing through until `mend`."""
        self.open = False
        self._loop.call_soon_threadsafe(self._drop)

    def mend(self) -> None:
        self.open = True

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _drop(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            if not self.open:
                return
            with suppress(OSError):  # its own connection is reset then, as it would have been there
                there, out = await asyncio.open_connection("127.0.0.1", self._target)
                self._writers.add(out)
                try:
                    await asyncio.gather(self._pass(reader, out, up=True), self._pass(there, writer, up=False))
                finally:
                    self._writers.discard(out)
                    out.close()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
            else:
                writer.close()

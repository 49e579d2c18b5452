"""A proxy in front of an S3 server that makes a share of the requests fail, as real stores do.

It is a real HTTP server: a client sees the same bytes, closed connections and silence as it would
of a store that is overloaded or behind a bad network. Signatures stay valid, since the host that
the client signed is passed on.

As a process of its own (`python -m raytvb.bench.faulty_proxy --help`) it prints its URL, runs until
its standard input ends, and prints how many requests failed in which way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, DummyCookieJar, web
from yarl import URL

STATUSES = {
    "408": ("RequestTimeout", "The socket was not read from or written to in time."),
    "425": ("TooEarly", "Too early."),
    "429": ("TooManyRequests", "Too many requests."),
    "500": ("InternalError", "We encountered an internal error. Please try again."),
    "502": ("BadGateway", "Bad gateway."),
    "503": ("SlowDown", "Please reduce your request rate."),
    "504": ("GatewayTimeout", "Gateway timeout."),
}
"""Code and message of each HTTP status that a request can fail with."""

ERROR_XML = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"

RESET, HANG, LOST = "reset", "hang", "lost answer"
CUT_RESET, CUT_SHORT = "reset in the body", "short body"
ALL = (*STATUSES, RESET, CUT_RESET, CUT_SHORT, HANG, LOST)
"""All ways to fail. reset: the connection is reset before an answer. hang: no answer at all. lost
answer: the request takes effect, then the connection is reset. reset in the body, short body: half
the body arrives, then the connection is reset, or ends as if all were well.
"""

BODIES = (CUT_RESET, CUT_SHORT)
"""Ways to fail of answers that have a body."""

# Of one connection, not of the file that is asked for.
HOP_BY_HOP = {
    "connection",
    "expect",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
START_SECONDS = 30.0


class FaultyProxy:
    """A proxy that runs in a thread of this process, and a context manager.

    A given share of the requests fails, each in one of the given ways. Which ones is drawn with the
    seed: the same order of requests meets the same faults.
    """

    def __init__(
        self,
        endpoint: str,
        share: float,
        kinds: Sequence[str] = ALL,
        seed: int = 0,
        hang_s: float = 600.0,
    ) -> None:
        """Starts the proxy on a free port of the loopback interface.

        endpoint: URL of the server. share: of the requests that fail, from 0 to 1; it may be
        changed at any time. kinds: some of `ALL`. hang_s: seconds after which a request without an
        answer is reset, unless the client has given up before.
        Raises ValueError for an unknown kind.
        """
        if unknown := set(kinds) - set(ALL):
            raise ValueError(f"unknown faults {sorted(unknown)}; there are {ALL}")
        self.endpoint, self.share, self.kinds = endpoint.rstrip("/"), share, tuple(kinds)
        self.hang_s = hang_s
        self.failed: Counter[str] = Counter()
        """Number of requests that failed, by kind."""
        self.requests = 0
        """Number of all requests."""
        self.answered: Callable[[str, str, int, str], None] | None = None
        """Called for every request that reached the server, with its method, its path and query,
        the server's status, and the way in which the answer is spoiled ('' if it is not).
        """
        self.url = ""
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._thread.start()
        if not self._started.wait(START_SECONDS):
            raise RuntimeError("the proxy did not start")

    def close(self) -> None:
        """End the proxy. Requests under way are cut off."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # In the proxy's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        runner = self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._stop(runner))
        self._loop.close()

    async def _start(self) -> web.AppRunner:
        self._session = ClientSession(
            timeout=ClientTimeout(total=None),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=["Accept", "Accept-Encoding", "Content-Type", "User-Agent"],
        )
        app = web.Application(client_max_size=2**40)
        app.router.add_route("*", "/{path:.*}", self._handle, expect_handler=self._expect)
        # Without an access log. A request whose client has gone is cancelled.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return runner

    async def _stop(self, runner: web.AppRunner) -> None:
        await runner.cleanup()
        await self._session.close()

    async def _expect(self, request: web.Request) -> web.StreamResponse | None:
        """What a client gets that waits for '100 Continue' before it sends its body."""
        # Kept with what the route has found, for the handler that runs next.
        fault = request.match_info["fault"] = self._draw(request)
        answer = await self._fail_early(request, fault)
        if answer is None:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        return answer

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        drawn = request.match_info.get("fault")
        fault = self._draw(request) if drawn is None else drawn
        answer = await self._fail_early(request, fault)
        return answer or await self._forward(request, body, fault)

    def _draw(self, request: web.Request) -> str:
        """How this request fails; '' if it does not."""
        self.requests += 1
        kinds = [kind for kind in self.kinds if request.method == "GET" or kind not in BODIES]
        # Both are drawn for every request, so that a share of 0 leaves the later faults as they are
        chance, place = self._random.random(), self._random.random()
        if not kinds or chance >= self.share:
            return ""
        fault = kinds[int(place * len(kinds))]
        self.failed[fault] += 1
        return fault

    async def _fail_early(self, request: web.Request, fault: str) -> web.Response | None:
        """The answer of a request that never reaches the server; None if it has to be passed on."""
        if fault in STATUSES:
            text = ERROR_XML.format(*STATUSES[fault])
            answer = web.Response(status=int(fault), text=text, content_type="application/xml")
            if not request.content.is_eof():
                answer.force_close()
            return answer
        if fault == HANG:
            await asyncio.sleep(self.hang_s)
        return _reset(request) if fault in (HANG, RESET) else None

    async def _forward(self, request: web.Request, body: bytes, fault: str) -> web.StreamResponse:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = URL(self.endpoint + request.raw_path, encoded=True)
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as answer:
                content = await answer.read()
            if self.answered is not None:
                self.answered(request.method, request.raw_path, answer.status, fault)
        except ClientConnectionError as error:
            return web.Response(status=502, text=f"no answer from {self.endpoint}: {error}")
        half = content[: len(content) // 2] if fault in BODIES else b""
        if fault == LOST or (fault in BODIES and not half):
            return _reset(request)
        kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP]
        response = web.StreamResponse(status=answer.status, headers=dict(kept))
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(half or content)
        if fault == CUT_RESET:
            return _reset(request)
        if fault == CUT_SHORT and request.transport is not None:
            request.transport.close()
        else:
            await response.write_eof()
        return response


def _reset(request: web.Request) -> web.Response:
    """Reset the connection at once. The response cannot be sent; it ends the request's handler."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        # Without lingering, closing sends a reset.
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the proxy until the standard input ends. Prints its URL, then its counts as JSON."""
    parser = argparse.ArgumentParser("python -m raytvb.bench.faulty_proxy", description=__doc__)
    parser.add_argument("endpoint", help="URL of the S3 server")
    parser.add_argument("--share", type=float, default=0.1, help="of the requests that fail")
    parser.add_argument("--kinds", nargs="+", default=list(ALL), choices=ALL, metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-s", type=float, default=600.0, help="seconds that a hang lasts")
    chosen = parser.parse_args(arguments)
    with FaultyProxy(
        chosen.endpoint, chosen.share, chosen.kinds, chosen.seed, chosen.hang_s
    ) as proxy:
        print(proxy.url, flush=True)
        with suppress(KeyboardInterrupt):
            sys.stdin.read()
    print(json.dumps({"requests": proxy.requests, "failed": dict(proxy.failed)}), flush=True)


if __name__ == "__main__":
    main()

"""Load and faults on a whole agent: floods, outages of the broker, idleness, and what streaming costs.

    scripts/bench service                                  everything, with the small engine of the tests
    scripts/bench service flood --rate 1000 --seconds 60   prompts a second at a queue of 32
    scripts/bench service outages --times 20               the broker is killed and started again while it answers
    scripts/bench service idle --seconds 60                processor and memory of the main process
    scripts/bench service overhead --package DIR           time a streamed token costs over the engine's own

An agent process and a mosquitto with the shipped configuration are started on free loopback ports. With --package the
agent runs that package with the real engine; without it the engine is a small one that costs next to nothing, so that
what is measured is the agent. Figures depend on what else the machine does: the load average is printed with them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from lamplighter_agent.package.manifest import decode_manifest  # noqa: E402
from lamplighter_agent.update.states import PackageRef  # noqa: E402
from lamplighter_agent.update.store import Store  # noqa: E402
from support.broker import Broker  # noqa: E402
from support.packages import write_package  # noqa: E402

DEVICE = "lamplighter/v1/device/bench"
REPLY = "lamplighter/v1/reply"
_DRAIN_S = 120.0
_AHEAD = 200
_TOKENS = 128


class Client:
    """A client that keeps what it gets by request id."""

    def __init__(self, port: int, name: str) -> None:
        self.reply = f"{REPLY}/{name}/bench"
        self.ended: dict[str, list[dict[str, Any]]] = {}
        self.online = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_queued_messages_set(0)
        self._client.max_inflight_messages_set(_AHEAD)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._published = self._acknowledged = 0
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def _on_connect(self, client: paho.Client, *_arguments: object) -> None:
        client.subscribe([(self.reply, 1), (f"{DEVICE}/status", 1)])

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        content = json.loads(message.payload)
        if message.topic.endswith("/status"):
            if content["state"] == "online":
                self.online.set()
            return
        content["received_s"] = time.monotonic()
        if content["type"] != "delta":
            self.ended.setdefault(content["id"], []).append(content)

    def _on_publish(self, *_arguments: object) -> None:
        self._acknowledged += 1

    @property
    def may_send(self) -> bool:
        """False while the broker has not taken what was sent: on a busy machine that, not the rate, is the limit."""
        return self._published - self._acknowledged < _AHEAD

    def send(self, leaf: str, **fields: object) -> None:
        """Publish a prompt or a command."""
        self._published += 1
        self._client.publish(f"{DEVICE}/{leaf}", json.dumps({**fields, "reply_to": self.reply}), 1)

    def wait(self, ids: set[str], timeout_s: float) -> set[str]:
        """Wait until each of these has ended; return those that have not."""
        end = time.monotonic() + timeout_s
        while (missing := ids - self.ended.keys()) and time.monotonic() < end:
            time.sleep(0.02)
        return missing

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


class World:
    """A broker and an agent."""

    def __init__(self, folder: Path, package: Path | None, queue_size: int) -> None:
        self.folder = folder
        _install(folder, package)
        self.socket = folder / "agent.sock"
        self.broker = Broker(folder)
        self.broker.start()
        settings = [
            "device.id=bench",
            f"state_dir={folder / 'state'}",
            f"mqtt.port={self.broker.port}",
            "mqtt.reconnect_max_s=3",
            f"local_api.socket={self.socket}",
            f"requests.queue_size={queue_size}",
            "log.level=error",
        ]
        command = [sys.executable, "-m", "support.run_agent", "", *settings]
        if package is not None:
            overrides = [argument for setting in settings for argument in ("--set", setting)]
            command = [sys.executable, "-m", "lamplighter_agent", "run", *overrides]
        path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        log = (folder / "agent.log").open("ab")
        environment = {**os.environ, "PYTHONPATH": path}
        self.agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder
        )
        log.close()
        self.process = psutil.Process(self.agent.pid)
        end = time.monotonic() + 120
        while self.get("/health")[0] != 200:
            if time.monotonic() > end or self.agent.poll() is not None:
                self.close()
                raise SystemExit(f"the agent does not come up: {(folder / 'agent.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask the local API; the status is 0 when it does not answer."""
        try:
            connection = _Unix(self.socket)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""

    def close(self) -> None:
        """End both."""
        self.agent.send_signal(signal.SIGTERM)
        self.agent.wait(30)
        self.broker.kill()


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(str(self._path))


def _install(folder: Path, package: Path | None) -> None:
    if package is None:
        package = folder / "package"
        write_package(package)
    manifest_bytes = (package / "manifest.json").read_bytes()
    manifest = decode_manifest(manifest_bytes)
    store = Store(folder / "state", reserve_bytes=0)
    with store.lock():
        for entry in manifest.files:
            blob = store.blobs.path(entry)
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(package / entry.name, blob)
        store.stage(manifest_bytes)
        store.activate(PackageRef(manifest.name, manifest.version))


@contextmanager
def world(package: Path | None, queue_size: int = 32) -> Iterator[World]:
    """Yield a broker and an agent, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-") as folder:
        made = World(Path(folder), package, queue_size)
        try:
            yield made
        finally:
            made.close()


def flood(arguments: argparse.Namespace) -> dict[str, Any]:
    """Send prompts at a rate, and a command each second; count what comes back."""
    with world(arguments.package) as made:
        client, operator = Client(made.broker.port, "flood"), Client(made.broker.port, "operator")
        time.sleep(1)
        sizes, cpu_before = [made.process.memory_info().rss], made.process.cpu_times()
        begun = time.monotonic()
        sent: set[str] = set()
        commands: dict[str, float] = {}
        next_command_s = next_size_s = begun
        while (now := time.monotonic()) < begun + arguments.seconds:
            while len(sent) < (now - begun) * arguments.rate and client.may_send:
                request_id = f"p{len(sent)}"
                client.send("prompt", id=request_id, prompt="flood", stream=False, max_tokens=8)
                sent.add(request_id)
            if now >= next_command_s:
                next_command_s += 1.0
                commands[f"c{len(commands)}"] = now
                operator.send("command", id=f"c{len(commands) - 1}", command="ping")
            if now >= next_size_s:
                next_size_s += 1.0
                sizes.append(made.process.memory_info().rss)
            time.sleep(0.002)
        ended_s = time.monotonic()
        unanswered = client.wait(sent, _DRAIN_S)
        drained_s = time.monotonic() - ended_s
        silent = operator.wait(set(commands), 5.0)
        sizes.append(made.process.memory_info().rss)
        cpu = made.process.cpu_times()
        kinds = Counter(str(answers[0].get("code", 200)) for answers in client.ended.values())
        delays = [operator.ended[name][0]["received_s"] - at for name, at in commands.items() if name not in silent]
        half = len(sizes) // 2
        result = {
            "seconds": arguments.seconds,
            "sent": len(sent),
            "sent_per_s": len(sent) / arguments.seconds,
            "ended_by_code": dict(kinds),
            "unanswered": len(unanswered),
            "last_answer_after_the_flood_s": drained_s,
            "answered_twice": sum(len(answers) > 1 for answers in client.ended.values()),
            "commands": len(commands),
            "commands_unanswered": len(silent),
            "command_median_s": statistics.median(delays),
            "command_worst_s": max(delays),
            "rss_before_mb": sizes[0] / 1e6,
            "rss_first_half_max_mb": max(sizes[1:half]) / 1e6,
            "rss_second_half_max_mb": max(sizes[half:]) / 1e6,
            "agent_cpu_s": cpu.user + cpu.system - cpu_before.user - cpu_before.system,
        }
        client.close()
        operator.close()
        return result


def outages(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill the broker again and again while answers stream; the client repeats what is unanswered, as one should."""
    with world(arguments.package) as made:
        client = Client(made.broker.port, "outages")
        client.online.wait(20)
        sent: set[str] = set()
        delays = []
        for round_number in range(arguments.times):
            ids = {f"r{round_number}-{number}" for number in range(6)}
            sent |= ids
            for request_id in ids:
                client.send("prompt", id=request_id, prompt="/count 60", deadline_s=120)
            time.sleep(0.05 + 0.02 * (round_number % 5))
            made.broker.kill()
            time.sleep(0.2)
            client.online.clear()
            begun = time.monotonic()
            made.broker.start()
            client.online.wait(30)
            delays.append(time.monotonic() - begun)
            for request_id in ids - client.ended.keys():
                client.send("prompt", id=request_id, prompt="/count 60", deadline_s=120)
            client.wait(ids, 20)
        lost = client.wait(sent, _DRAIN_S)
        state = json.loads(made.get("/status")[1])
        client.close()
        return {
            "outages": arguments.times,
            "requests": len(sent),
            "ended": len(client.ended),
            "lost_without_an_answer_or_error": len(lost),
            "ended_by_code": dict(Counter(str(each[0].get("code", 200)) for each in client.ended.values())),
            "received_twice": sum(len(each) > 1 for each in client.ended.values()),
            "different_answers_to_one_request": sum(
                len({answer.get("text") for answer in each}) > 1 for each in client.ended.values()
            ),
            "computed_by_the_agent": state["requests_total"],
            "online_again_median_s": statistics.median(delays),
            "online_again_worst_s": max(delays),
        }


def idle(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let the agent do nothing."""
    with world(arguments.package) as made:
        time.sleep(5)
        before, begun = made.process.cpu_times(), time.monotonic()
        switches = made.process.num_ctx_switches().voluntary
        time.sleep(arguments.seconds)
        spent, seconds = made.process.cpu_times(), time.monotonic() - begun
        used = spent.user + spent.system - before.user - before.system
        memory = made.process.memory_full_info()
        return {
            "seconds": seconds,
            "cpu_percent_of_a_core": 100 * used / seconds,
            "wake_ups_per_s": (made.process.num_ctx_switches().voluntary - switches) / seconds,
            "rss_mb": memory.rss / 1e6,
            "private_mb": memory.uss / 1e6,
        }


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare a streamed answer's time at the client with the engine's own, for each token, the first included."""
    options = {"stream": True, "max_tokens": _TOKENS, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"prompt": "Count: 1 2 3", **options})
    if arguments.package is None:
        body = json.dumps({"prompt": "/slow", "stream": True, "max_tokens": _TOKENS})
    extra, engine = [], []
    with world(arguments.package) as made:
        for _ in range(arguments.times):
            connection = _Unix(made.socket)
            begun = time.monotonic()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            for _ in response:
                ended = time.monotonic()
            state = json.loads(made.get("/status")[1])
            engine_s = state["time_to_first_token_s"] + (_TOKENS - 1) / state["generated_tokens_per_s"]
            engine.append(engine_s / _TOKENS)
            extra.append((ended - begun - engine_s) / _TOKENS)
            connection.close()
    return {
        "runs": arguments.times,
        "engine_ms_per_token": 1000 * statistics.median(engine),
        "overhead_ms_per_token_median": 1000 * statistics.median(extra),
        "overhead_ms_per_token_worst": 1000 * max(extra),
    }


SUBJECTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "flood": flood,
    "outages": outages,
    "idle": idle,
    "overhead": overhead,
}


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench service", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--package", type=Path, help="run this package with the real engine")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of flood and idle (default: 60)")
    parser.add_argument("--rate", type=float, default=1000.0, help="prompts a second (default: 1000)")
    parser.add_argument("--times", type=int, default=20, help="outages, and runs of overhead (default: 20)")
    parser.add_argument("--json", action="store_true", help="print for a machine")
    arguments = parser.parse_args()
    results = {}
    if unknown := set(arguments.what) - SUBJECTS.keys():
        parser.error(f"there is no {', '.join(unknown)}")
    for name in arguments.what or SUBJECTS:
        result = SUBJECTS[name](arguments)
        results[name] = {**result, "load_1m": os.getloadavg()[0], "cores": os.cpu_count()}
        if not arguments.json:
            print(f"\n{name}: {(SUBJECTS[name].__doc__ or '').splitlines()[0]}")
            for key, value in results[name].items():
                print(f"  {key:34} {value:.4g}" if isinstance(value, float) else f"  {key:34} {value}", flush=True)
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

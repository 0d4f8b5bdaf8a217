"""Runs a configuration on Flower's simulation: a private SuperLink, `flwr run`, and the run folder of `fedzo run`.

Imports nothing of Flower. Its programs run as subprocesses with a home of their own, so that neither the user's
Flower configuration nor another SuperLink on this machine matters, and none of them outlives the call.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedzo.config import Config, to_toml
from fedzo.errors import RunError
from fedzo.processes import Process, Processes
from fedzo.run_folder import BUDGETS

START_TIMEOUT = 60.0  # seconds for the SuperLink to answer
_MARK = "fedzo: "  # begins the lines of our own apps in Flower's log


def run_config_toml() -> str:
    """The section [tool.flwr.app.config] of pyproject.toml: every key with its default, and `out`."""
    section = "tool.flwr.app.config"
    body = to_toml(Config()).replace("\n[", f"\n[{section}.")
    return f'[{section}]\nout = ""\n{body}'


def federation_config(config: Config) -> dict[str, int | float]:
    """Flower's federation-config for a run: one node a client, and as many at once as the CPU cores (or GPUs) carry."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    asked = config.federation.clients_per_round or config.data.clients
    options: dict[str, int | float] = {
        "num-supernodes": config.data.clients,
        "init-args-num-cpus": cores,
        "client-resources-num-cpus": min(cores, config.runtime.threads or max(1, cores // asked)),
    }
    if config.runtime.device != "cpu":
        import torch

        if torch.cuda.is_available():
            options["client-resources-num-gpus"] = 1.0
    return options


def run_flower(config: Config, out: Path, *, quiet: bool = False) -> None:
    """Runs a configuration on Flower's simulation, or goes on with the run in `out`.

    Args:
        out: the run folder; Flower's own log becomes flower.log in it.
        quiet: do not show progress (on stderr).

    Raises:
        RunError: Flower is not installed, or the run failed.
    """
    require_flower("ray")
    out = out.resolve()
    log_path = out / "flower.log"
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = log_path.open("w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the run folder {out}: {error.strerror}") from error
    with log, tempfile.TemporaryDirectory(prefix="fedzo-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        app = copy_app(home / "app")
        run_config = home / "run.toml"
        run_config.write_text(f"out = {json.dumps(str(out))}\n{to_toml(config.resolved())}", encoding="utf-8")
        options = " ".join(f"{key}={value}" for key, value in federation_config(config).items())
        with _superlink(home, out / BUDGETS) as environment:
            command = ["run", str(app), "--stream", "--run-config", str(run_config), "--federation-config", options]

            def show(line: str) -> None:
                log.write(line)
                log.flush()
                if not quiet and line.startswith(_MARK):
                    print(line.removeprefix(_MARK), end="", file=sys.stderr, flush=True)

            said = _stream(command, home, environment, show)
            status, details = _outcome(home, environment, said)
    if status != "finished:completed":
        raise RunError(f"Flower's run is {status}: {details.rstrip('.')}. Its log is {log_path}")


def require_flower(*more: str) -> None:
    """Raises RunError where Flower, or another module besides, is not installed."""
    for module in ("flwr", *more):
        if importlib.util.find_spec(module) is None:
            raise RunError(f'the engine "flower" needs {module}, which is not installed: pip install "fedzo[flower]"')


def copy_app(target: Path) -> Path:
    """The Flower app (pyproject.toml, clients/, server/) as a folder of its own: a checkout may hold gigabytes."""
    package = Path(__file__).resolve().parent
    for source in (package / "_flower_app", package.parent):  # in a wheel, in a checkout
        if (source / "pyproject.toml").is_file() and (source / "server" / "app.py").is_file():
            for name in ("clients", "server"):
                shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(source / "pyproject.toml", target)
            return target
    raise RunError(f"this installation of fedzo at {package} lacks its Flower app; reinstall fedzo")


def environment_of(home: Path) -> dict[str, str]:
    """In which Flower's programs run: with a home of their own, and nothing that asks the network."""
    scripts = sysconfig.get_path("scripts")  # Flower starts its programs by name
    local = "127.0.0.1,localhost"
    return os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), local])),
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), local])),
    }


@contextmanager
def _superlink(home: Path, budgets: Path) -> Iterator[dict[str, str]]:
    """A SuperLink on a free loopback port; its environment, in which `flwr` talks to it and clients keep their budgets.

    Raises:
        RunError: it does not start.
    """
    environment = environment_of(home) | {"FEDZO_STATE": str(budgets)}
    log = home / "superlink.log"
    for _ in range(3):  # between choosing the port and using it, somebody else may take it
        port = free_port()
        connection = f'[superlink.fedzo]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "fedzo"\n\n{connection}', encoding="utf-8")
        options = ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        with Processes() as processes:
            # Its working directory is where Ray's workers look for modules first: nothing there may shadow the app's.
            process = processes.start(
                [program("flower-superlink"), *options, "--port", str(port)], folder=home, environment=environment,
                log=log,
            )  # fmt: skip
            if answers(process, f"http://127.0.0.1:{port}/health"):
                yield environment
                return
    raise RunError("Flower's SuperLink did not start: " + " / ".join(tail(log)))


def free_port() -> int:
    """A port of this machine that nobody listens on, now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 5) -> list[str]:
    """The last lines of a log; none where there is no log."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return []


def program(name: str) -> str:
    """One of Flower's programs, from this environment."""
    path = Path(sysconfig.get_path("scripts")) / name
    return str(path) if path.exists() else name


def answers(process: Process, address: str, authority: Path | None = None) -> bool:
    """Waits until a program of Flower's answers at its address (True), or has ended (False).

    Raises:
        RunError: it does neither for a while.
    """
    context = ssl.create_default_context(cafile=str(authority)) if authority is not None else None
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    direct, end = urllib.request.build_opener(*handlers), time.monotonic() + START_TIMEOUT
    while process.alive:
        with contextlib.suppress(OSError), direct.open(address, timeout=1.0):
            return process.alive
        if time.monotonic() > end:
            raise RunError(f"{address} did not answer within {START_TIMEOUT:.0f} s")
        time.sleep(0.1)
    return False


def _stream(arguments: list[str], home: Path, environment: Mapping[str, str], show: Callable[[str], None]) -> list[str]:
    """Runs `flwr`, showing its lines as they come; returns the last of them."""
    process = subprocess.Popen(
        [program("flwr"), *arguments], cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    last: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            show(line)
            last = [*last[-9:], line.strip()]
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    return last


def _outcome(home: Path, environment: Mapping[str, str], said: list[str]) -> tuple[str, str]:
    """Status and details of the SuperLink's only run; `flwr run` itself exits with 0 also when the run failed."""
    while True:
        listed = subprocess.run(
            [program("flwr"), "ls", "--format", "json"], cwd=home, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            runs = json.loads(listed.stdout)["runs"]
        except (ValueError, KeyError):
            return "unknown", " / ".join(line for line in said if line)
        if not runs:
            return "not started", " / ".join(line for line in said if line)
        status = str(runs[0]["status"])
        if status.startswith("finished"):
            return status, str(runs[0]["status-details"]).removeprefix("Simulation failed with exception: ")
        time.sleep(0.5)

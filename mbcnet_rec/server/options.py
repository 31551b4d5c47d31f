"""The options of `mbcnet serve`: each is declared here once, for the command line and for the workers."""

import ipaddress
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data.errors import InputError


def option(default: Any, words: str, least: float = 0) -> Any:
    """An option of the command line; `least` of a number."""
    return field(default=default, metadata={"help": words, "least": least})


@dataclass(frozen=True)
class Options:
    """What `mbcnet serve` was asked for."""

    artifact: Path
    state: Path = Path()  # the folder by which workers agree, see models.py
    score_token: str = ""  # empty: none is wanted
    models_token: str = ""
    host: str = option("127.0.0.1", "address to listen at")
    port: int = option(8080, "0: any free one")
    workers: int = option(1, "processes; they share the tables' pages", 1)
    threads: int = option(0, "of each worker's arithmetic; 0: the cores, divided")
    drain_seconds: int = option(20, "a stop waits so long for requests under way", 1)
    max_rows: int = option(4096, "of a request and of a pass; more is answered by 413", 1)
    max_body_mb: int = option(16, "of a request; more is answered by 413", 1)
    queue: int = option(256, "requests that wait in a worker; more is answered by 429", 1)
    window_us: int = option(100, "microseconds that requests wait for others to share a pass; 0: none is shared")
    adaptive: bool = option(False, "do not wait after a pass of a single request")
    models: Path | None = option(None, "POST /models takes artifacts below this folder")
    watch: bool = option(False, "serve what comes into that folder")
    shadow: Path | None = option(None, "another artifact, which scores some of the passes too, for /metrics")
    shadow_share: float = option(0.1, "of the passes")
    split: str = option("", "KEY=SHARE: --shadow answers this share of KEY's values; answers name their arm, a or b")
    split_seed: int = option(0, "of which values these are")
    score_token_file: Path | None = option(None, "/score wants this bearer token; or MBCNET_SCORE_TOKEN")
    models_token_file: Path | None = option(None, "/models wants this one; or MBCNET_MODELS_TOKEN")

    @property
    def arms(self) -> tuple[str, float] | None:
        """Key and share of the split, if there is one."""
        key, _, share = self.split.rpartition("=")
        with suppress(ValueError):
            return (key, float(share)) if key and 0 <= float(share) <= 1 else None
        return None

    def check(self) -> None:
        """Raise InputError where a value is out of its range, or two contradict."""
        for each in fields(self):
            value, name = getattr(self, each.name), each.name.replace("_", "-")
            most = {"port": 65535, "shadow_share": 1}.get(each.name, 10**9)
            if each.type in ("int", "float", int, float) and not each.metadata["least"] <= value <= most:
                raise InputError(f"--{name} {value}: wanted {each.metadata['least']} to {most}; change it")
        if self.models and not self.models.is_dir():
            raise InputError(f"--models {self.models}: not a folder; make it, or name another one")
        if self.watch and not self.models:
            raise InputError("--watch: wanted --models FOLDER, the folder to watch")
        if self.split and (self.arms is None or not self.shadow):
            raise InputError(f"--split {self.split}: wanted KEY=SHARE, such as user_id=0.1, and --shadow OTHER")
        if self.models and not self.models_token and not is_loopback(self.host):
            raise InputError(
                f"--models with --host {self.host}: anyone could change the model; give --models-token-file"
            )


def read_token(path: Path | None, variable: str) -> str:
    """A token from its file, else from the environment; empty where neither is given. Raises InputError."""
    try:
        token = path.read_text(encoding="utf-8").strip() if path else os.environ.get(variable, "").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: wanted a token, one word of ASCII ({error}); write another") from None
    if (path and not token) or not token.isascii() or len(token.split()) > 1:
        raise InputError(f"{path or variable}: wanted a token, one word of ASCII; write another")
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

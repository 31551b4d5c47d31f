"""What `mbcnet serve` was asked for, with the values that hold where nothing was said."""

import ipaddress
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError
from data.schema.bounds import bounded, bounds_problem


@dataclass(frozen=True)
class Options:
    """What `mbcnet serve` was asked for; mbcnet_rec/commands/options.toml says what each is."""

    artifact: Path
    state: Path = Path()  # the folder by which workers agree, see models.py
    score_token: str = ""  # empty: none is wanted
    models_token: str = ""
    host: str = "127.0.0.1"
    port: int = bounded(8080, at_least=0, at_most=65535)
    workers: int = bounded(1, at_least=1)
    threads: int = bounded(0, at_least=0)
    drain_seconds: int = bounded(20, at_least=1)
    max_rows: int = bounded(4096, at_least=1)
    max_body_mb: int = bounded(16, at_least=1)
    queue: int = bounded(256, at_least=1)
    window_us: int = bounded(100, at_least=0)
    adaptive: bool = False
    models: Path | None = None
    watch: bool = False
    shadow: Path | None = None
    shadow_share: float = bounded(0.1, at_least=0, at_most=1)
    split: str = ""
    split_seed: int = bounded(0, at_least=0)

    @property
    def arms(self) -> tuple[str, float] | None:
        """Key and share of the split, if there is one."""
        key, _, share = self.split.rpartition("=")
        with suppress(ValueError):
            return (key, float(share)) if key and 0 <= float(share) <= 1 else None
        return None

    def check(self) -> None:
        """Raise InputError where a value is out of its range, or two contradict."""
        if problem := bounds_problem(self):
            name, _, rest = problem.partition(" = ")
            raise InputError(f"--{name.replace('_', '-')} {rest}")
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

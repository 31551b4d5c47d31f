"""The machines a plan is made for: hosts, devices, memory and bandwidths, from a preset or a TOML file."""

import dataclasses
import hashlib
import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from data.errors import InputError
from data.schema.bounds import Bounded, bounded
from data.schema.parse import parse_dataclass, read_toml, to_toml_value

GIB = 1024**3
PRESETS = Path(__file__).parents[1] / "clusters"
MAX_RANKS = 65_536
SHAPE, DATA_SHEET = "set it, e.g. 2x8 is 2 hosts of 8 devices", "set it from the data sheet"
MEMORY_EFFICIENCY = 0.93  # of the data sheet: FBGEMM's forward lookup at dim 128 on an H100
LINK_EFFICIENCY = 0.8  # of the data sheet, assumed: all-to-all and reduce-scatter of large messages


@dataclass(frozen=True)
class Cluster(Bounded):
    """Equal hosts with equal devices. GB are 1e9 bytes; bandwidths count one direction. `sharding/clusters` names the sources."""

    name: str  # of the host type, e.g. "h100-80g"
    device: Literal["cuda", "cpu"]  # on cpu a "device" is one process
    hosts: int = bounded(MISSING, at_least=1, fix=SHAPE)
    devices_per_host: int = bounded(MISSING, at_least=1, fix=SHAPE)
    hbm_gib: float = bounded(MISSING, at_least=0)  # memory of one device; 0 on cpu
    ddr_gib: float = bounded(MISSING, above=0, fix=DATA_SHEET)  # memory of one host
    hbm_gb_per_second: float = bounded(MISSING, at_least=0)  # of one device's memory
    ddr_gb_per_second: float = bounded(MISSING, above=0, fix=DATA_SHEET)  # of one host's memory
    host_link_gb_per_second: float = bounded(MISSING, at_least=0)  # of a device to its host's memory
    nvlink_gb_per_second: float = bounded(MISSING, above=0, fix=DATA_SHEET)  # between devices of a host
    network_gb_per_second: float = bounded(MISSING, above=0, fix=DATA_SHEET)  # of a device to other hosts
    dense_tflops: float = bounded(MISSING, above=0, fix=DATA_SHEET)  # peak of a device, in the training dtype
    # share of that peak that a whole training step of the dense part reaches
    dense_efficiency: float = bounded(MISSING, above=0, at_most=1, fix="0.2 is usual on a GPU")
    cores: int = bounded(MISSING, at_least=1)  # of one host
    decode_values_per_second: float = bounded(MISSING, above=0)  # Parquet values that one core decodes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size > MAX_RANKS:
            raise InputError(
                f"hosts = {self.hosts}: {self.world_size:,} ranks; wanted at most {MAX_RANKS:,}; lower hosts"
            )
        for key in ("hbm_gib", "hbm_gb_per_second", "host_link_gb_per_second"):
            if self.device == "cuda" and getattr(self, key) <= 0:
                raise InputError(f"{key} = {getattr(self, key)}: wanted more than 0; {DATA_SHEET}")

    @property
    def world_size(self) -> int:
        """Ranks: one a device."""
        return self.hosts * self.devices_per_host

    @property
    def hbm_bytes(self) -> int:
        """Device memory of one rank."""
        return int(self.hbm_gib * GIB)

    @property
    def ddr_bytes(self) -> int:
        """Host memory of one rank: its share of the host."""
        return int(self.ddr_gib * GIB / self.devices_per_host)

    @property
    def memory_bytes_per_second(self) -> float:
        """Bandwidth of the memory where a rank's tables live."""
        host_share = self.ddr_gb_per_second / self.devices_per_host
        return 1e9 * (self.hbm_gb_per_second if self.device == "cuda" else host_share)

    def resized(self, hosts: int, devices_per_host: int) -> "Cluster":
        """The same hosts in another number; a host with fewer devices keeps its memory and cores."""
        return dataclasses.replace(self, hosts=hosts, devices_per_host=devices_per_host)

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever a figure does."""
        return hashlib.sha256(json.dumps(to_toml_value(self), sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.hosts}x{self.devices_per_host}:{self.name}"


def preset_names() -> list[str]:
    """Names that `read_cluster` knows."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_cluster(text: str) -> Cluster:
    """Read `HOSTSxDEVICES:KIND`, or `KIND`, a preset or a TOML file with Cluster's keys; InputError if it is none or out of range."""
    match = re.fullmatch(r"(?:(\d+)x(\d+):)?([^:]+)", text)
    kind, known = match[3] if match else "", preset_names()
    if not kind.endswith(".toml") and kind not in known:
        raise InputError(
            f"--cluster {text!r}: wanted HOSTSxDEVICES:KIND such as 16x8:h100-80g; KIND is one of {', '.join(known)}, or a TOML file with the "
            f"keys of {PRESETS.name}/h100-80g.toml"
        )
    path = Path(kind) if kind.endswith(".toml") else PRESETS / f"{kind}.toml"
    cluster = parse_dataclass(Cluster, read_toml(path), str(path))
    try:
        return cluster.resized(int(match[1]), int(match[2])) if match and match[1] else cluster
    except InputError as error:
        raise InputError(f"--cluster {text!r}: {error}") from None


def default_cluster(world_size: int, local_world_size: int, device: str) -> Cluster:
    """The cluster of a run that names none, equal on every rank: 16 GiB for a rank on a CPU, the H100's figures for a GPU."""
    hosts = max(1, world_size // local_world_size)
    if device == "cuda":
        return read_cluster("h100-80g").resized(hosts, local_world_size)
    plain = read_cluster("cpu").resized(hosts, local_world_size)
    return dataclasses.replace(
        plain, name="default", ddr_gib=16.0 * local_world_size, cores=max(plain.cores, local_world_size)
    )

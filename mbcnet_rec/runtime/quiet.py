"""Silences, by name and for a while, what the libraries say on every run and no user can change."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torch.fx: "is_fx_tracing will return true ..."; torchrec.distributed.utils: "data_parallel: caching params will be ignored";
# comm: each rank of several hosts names the groups that it made
LOGGERS = (
    "torch.fx._symbolic_trace",
    *(f"torchrec.distributed.{name}" for name in ("planner", "planner.stats", "utils", "logger", "comm")),
)
MODULES = ("torchrec", "fbgemm_gpu", "torch.distributed", "torch.autograd")


def _is_ours_to_read(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Sharding spec not found for ")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence known words of torch and TorchRec; on exit loggers and filters are as they were before."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in MODULES:
            warnings.filterwarnings("ignore", module=module.replace(".", r"\.") + r"(\..*)?$")
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        root.addFilter(_is_ours_to_read)  # TorchRec logs this one by the root logger itself
        try:
            yield
        finally:
            root.removeFilter(_is_ours_to_read)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

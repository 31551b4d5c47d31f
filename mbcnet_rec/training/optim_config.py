"""Which optimizers a run uses, and their rates. Apart from optim.py because that imports torchrec."""

from dataclasses import dataclass
from typing import Literal

from data.errors import InputError


@dataclass(frozen=True)
class EmbeddingOptimConfig:
    """Optimizer of the tables: w -= lr * g / (sqrt(state) + eps).

    Attributes:
        name: rowwise_adagrad (one state a row: the mean of squared gradients over the row), adagrad (one an element), sgd, or adam:
            dense Adam over whole tables, rows that no batch looked up included, as FuxiCTR and BARS train. It wants every table
            data_parallel (sharding.sharding_types = ["data_parallel"]), and so small tables.
        lr: learning rate.
        eps: of adagrad, rowwise_adagrad and adam.
        init_std: standard deviation of the initial rows.
        l2: lambda of lambda / 2 ||E||^2 over whole tables at every step, FuxiCTR's embedding_regularizer; of adam only, since the
            others touch the rows of a batch only.
    """

    name: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: float = 0.02
    eps: float = 1e-8
    init_std: float = 0.02
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a penalty that only some rows would feel."""
        for key in ("eps", "init_std"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} = {getattr(self, key)}: wanted 0 or more; remove the minus")
        if self.l2 < 0:
            raise InputError(f"l2 = {self.l2}: wanted 0 (none) or more; remove the minus")
        if self.l2 > 0 and self.name != "adam":
            raise InputError(
                f"l2 = {self.l2}: name = {self.name!r} touches only the rows of a batch, so the penalty would not be that of whole "
                "tables; use name = 'adam' with sharding.sharding_types = ['data_parallel'], or l2 = 0"
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizers of a run.

    Attributes:
        dense_lr: learning rate of Adam on the dense part.
        dense_eps: of that Adam. 1e-8 is torch's default; with it parameters whose gradient is mostly rounding
            noise move as fast as any other, and runs on other world sizes drift apart.
        weight_decay: decoupled decay of the dense part, where it is above 0.
        embedding: of the tables.
    """

    dense_lr: float = 1e-3
    dense_eps: float = 1e-6
    weight_decay: float = 0.0
    embedding: EmbeddingOptimConfig = EmbeddingOptimConfig()

    def __post_init__(self) -> None:
        """Refuse rates that cannot train."""
        if self.dense_lr <= 0 or self.embedding.lr <= 0:
            raise InputError(
                f"dense_lr = {self.dense_lr}, embedding.lr = {self.embedding.lr}: wanted numbers above 0"
            )
        for key in ("dense_eps", "weight_decay"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} = {getattr(self, key)}: wanted 0 or more; remove the minus")

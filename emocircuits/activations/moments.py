"""Running statistics of activations on the model's device: memory does not grow with the number of batches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .sites import Key


class Moments:
    """Count, mean and (optionally) covariance per group and key; give it to ``capture(into=...)``.

    Set `groups` ([B] long) before each batch; with one group it may stay None. Sums are float32 around a pivot,
    the first batch's mean, so that large common offsets do not cost precision; results are float64.
    """

    def __init__(self, n_groups: int = 1, covariance: bool = False) -> None:
        self.n_groups, self.covariance = n_groups, covariance
        self.groups: Tensor | None = None
        self._pivot: dict[Key, Tensor] = {}
        self._count: dict[Key, Tensor] = {}
        self._sum: dict[Key, Tensor] = {}
        self._outer: dict[Key, Tensor] = {}

    def __call__(self, key: Key, value: Tensor) -> None:
        x = value.detach().flatten(1).float()
        groups = self._groups(len(x), x.device)
        if key not in self._pivot:
            self._pivot[key] = x.mean(0)
            self._count[key] = torch.zeros(self.n_groups, dtype=torch.float64, device=x.device)
            self._sum[key] = torch.zeros(self.n_groups, x.shape[1], dtype=torch.float64, device=x.device)
            if self.covariance:
                self._outer[key] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        x = x - self._pivot[key]
        self._count[key] += torch.bincount(groups, minlength=self.n_groups)
        self._sum[key].index_add_(0, groups, x.double())
        if self.covariance:
            self._outer[key] += x.mT @ x

    def _groups(self, n: int, device: torch.device) -> Tensor:
        if self.groups is None:
            if self.n_groups > 1:
                raise InputError("set Moments.groups to the group of each row before the batch")
            return torch.zeros(n, dtype=torch.long, device=device)
        if len(self.groups) != n:
            raise InputError(f"Moments.groups names {len(self.groups)} rows, but the batch has {n}")
        return self.groups.to(device)

    def count(self, key: Key) -> Tensor:
        """[n_groups] rows seen."""
        return self._count[key]

    def mean(self, key: Key) -> Tensor:
        """[n_groups, width] float64; NaN for a group that was never seen."""
        count = self._count[key][:, None]
        return torch.where(count > 0, self._sum[key] / count, torch.nan) + self._pivot[key].double()

    def cov(self, key: Key) -> Tensor:
        """[width, width] covariance over all rows (n - 1); raises InputError unless covariance=True and n > 1."""
        total = self._count[key].sum()
        if not self.covariance or total < 2:
            raise InputError("a covariance needs Moments(covariance=True) and at least two rows")
        sums = self._sum[key].sum(0)
        return (self._outer[key] - torch.outer(sums, sums) / total) / (total - 1)

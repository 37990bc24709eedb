# SPDX-License-Identifier: Apache-2.0
"""What metrics measure, and how they sample: everything drawn by (seed, number), so that processes can share it."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

ORDER, LATENTS, CHOICES = range(3)  # Streams of random numbers.


class MetricError(ValueError):
    """A metric that cannot be measured with what was given; one line with what was expected and what was found."""


class Request(NamedTuple):
    """Pictures to draw. z: [N, Z]. conditioning: labels [N, 25] of the mapping. c: cameras [N, 25].

    v: meshes [N, V + 68, 3]. items: which items of the data set cameras are from, for drawers that have their pictures.
    """

    z: torch.Tensor
    conditioning: torch.Tensor
    c: torch.Tensor
    v: torch.Tensor
    items: Sequence[int]


class Drawn(NamedTuple):
    """picture: [N, 3, R, R] uint8. depth: [N, r, r], distance along the rays in world units; None where unknown."""

    picture: torch.Tensor
    depth: torch.Tensor | None


class Drawer(Protocol):
    """What draws the pictures under test: a network, or a stand-in whose numbers are known."""

    z_dim: int

    def __call__(self, request: Request) -> Drawn:
        """Return the pictures of a request."""


class Truth(NamedTuple):
    """Coefficients that a drawn data set was made of, by item: identity [N, I], expression [N, E] and its names."""

    identity: np.ndarray
    expression: np.ndarray
    expression_names: tuple[str, ...]


@dataclasses.dataclass(kw_only=True)
class Subject:
    """Everything a metric is given; all processes of `ranks` call it together.

    dataset: items (image [3, R, R] uint8, label [25], mesh [V + 68, 3]) by index, `camera_and_mesh(index)`, len.
    num: pictures to draw in place of a metric's own number. batch: pictures at a time; numbers depend on it in their
    last bits only. network(name): the feature network of a name. estimator(): of expression, pose and identity.
    renderer(resolution): draws meshes (`training.mesh_render.MeshRenderer`). head: model of the data set's heads, None
    where truth is. conditioning: label [25] of identities seen under several cameras. content: hash of the pictures of
    items. cache: folder of features. memo: what its metrics share; a subject made of this one by
    `dataclasses.replace` begins with an empty one.
    """

    drawer: Drawer
    dataset: Any
    ranks: Any
    seed: int = 0
    num: int | None = None
    batch: int = 8
    network: Callable[[str], Any] | None = None
    estimator: Callable[[], Any] | None = None
    renderer: Callable[[int], Any] | None = None
    truth: Truth | None = None
    head: Callable | None = None
    conditioning: np.ndarray | None = None
    content: Callable[[Sequence[int]], str] | None = None
    cache: pathlib.Path | None = None
    is_quiet: bool = True
    memo: dict = dataclasses.field(default_factory=dict, init=False)

    def order(self) -> np.ndarray:
        """Return the numbers of all items in an order of the seed's."""
        return np.random.default_rng([self.seed, ORDER]).permutation(len(self.dataset))

    def items(self, numbers: Iterable[int]) -> list[int]:
        """Return the items at places of the seed's order, which begins anew at its end."""
        order = self.order()
        return [int(order[i % len(order)]) for i in numbers]

    def latents(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return latents [N, Z] by their numbers, on the device."""
        rows = [np.random.default_rng([self.seed, LATENTS, i]).standard_normal(self.drawer.z_dim) for i in numbers]
        return torch.from_numpy(np.stack(rows)).float().to(self.ranks.device)

    def pictures(self, items: Sequence[int]) -> torch.Tensor:
        """Return the data set's pictures [N, 3, R, R] uint8 on the device."""
        return self.on_device(np.stack([self.dataset[int(i)].image for i in items]))

    def cameras_and_meshes(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return labels [N, 25] and meshes [N, V + 68, 3] of items, on the device; a label and its own mesh."""
        labels, meshes = zip(*(self.dataset.camera_and_mesh(int(i)) for i in items), strict=True)
        return self.on_device(np.stack(labels)[:, :25]), self.on_device(np.stack(meshes))

    def same_conditioning(self, count: int) -> torch.Tensor:
        """Return the label [count, 25] that identities are mapped with when cameras change."""
        return self.on_device(self.conditioning).expand(count, -1)

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a tensor of the subject's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.ranks.device)

    @torch.no_grad()
    def rows(self, total: int, width: int, work: Callable[[range], torch.Tensor], what: str) -> torch.Tensor:
        """Return [total, width] float32 in order: work(range of numbers) -> their rows, shared among the processes.

        A batch holds the same numbers however many processes there are; all of them get all rows.
        """
        result = torch.zeros([total, width], device=self.ranks.device)
        starts = range(self.ranks.rank * self.batch, total, self.ranks.size * self.batch)
        for start in tqdm(starts, what, delay=1, disable=self.is_quiet or not self.ranks.is_first):
            numbers = range(start, min(start + self.batch, total))
            result[start : numbers.stop] = work(numbers)
        self.ranks.sum_(result, what)  # Adding zeros changes no bit.
        return result


def summarise(rows: torch.Tensor, names: Sequence[str], *owners: torch.Tensor) -> dict[str, float]:
    """Return means NAME and standard errors NAME_se of columns [N, len(names)]; owners: see `mean_and_error`."""
    values = {}
    for name, column in zip(names, rows.unbind(dim=1), strict=True):
        values[name], values[f'{name}_se'] = mean_and_error(column, *owners)
    return values


def mean_and_error(values: torch.Tensor, *owners: torch.Tensor) -> tuple[float, float]:
    """Return the mean of values [N], those that are not numbers left out, and its standard error (NaN below two).

    owners: up to two tensors [N] of numbers, such as latents and items; values of one owner are not independent
    (Cameron, Gelbach and Miller 2011: clusters of two ways).
    """
    kept = values.isfinite().cpu()
    values = values.cpu()[kept].double()
    if len(values) < 2:
        return (float(values.mean()) if len(values) else float('nan')), float('nan')
    deviations, alone = values - values.mean(), torch.arange(len(values))
    variances = [_variance(deviations, owner[kept]) for owner in owners] or [_variance(deviations, alone)]
    variance = sum(variances) - (_variance(deviations, alone) if len(variances) > 1 else 0)
    if variance <= 0:  # The difference of estimates may fall below nothing; NaN does not.
        variance = max(variances)
    return float(values.mean()), variance**0.5


def _variance(deviations, owner):
    """Return the variance of the mean where values of one owner go together."""
    numbers = owner.unique(return_inverse=True)[1]
    sums = torch.zeros(int(numbers.max()) + 1, dtype=torch.float64).index_add_(0, numbers, deviations)
    if len(sums) < 2:
        return float('nan')
    return float(sums.square().sum()) / len(deviations) ** 2 * len(sums) / (len(sums) - 1)

"""The rows of the token embedding that a training uses: the optimiser and the averages leave out the others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from latentdiff.models.text_conditioned_unet import TextConditionedUNet
from latentdiff.training.ema import trainable


class UsedRows:
    """Shrinks the token embedding to the rows that the training has used so far, while it is updated and averaged.

    Captions use a few hundred tokens of a vocabulary of 49,408. A row that never had a gradient has moments of 0, so
    AdamW without weight decay leaves it as it is, and its average stays the row itself: weights, moments, averages and
    checkpoints are the same without any work on it.
    Does nothing with weight decay, which changes every row; with several processes, whose rows are not known here; on
    GPUs, which would wait for the number of rows; and unless rows are whole vectors of the processor (of 16 numbers,
    with AVX-512), as the numbers left over are rounded otherwise.
    """

    def __init__(
        self,
        network: TextConditionedUNet,
        optimizer: AcceleratedOptimizer,
        averages: Sequence[dict[str, Tensor]],
        accelerator: Accelerator,
    ) -> None:
        """averages: of the network's trainable parameters, by name; at least one."""
        table = None if network.text_encoder is None else network.text_encoder.token_vectors
        decays = [group["weight_decay"] for group in optimizer.param_groups if any(p is table for p in group["params"])]
        alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
        works = table is not None and decays == [0.0] and alone and table.shape[1] % 16 == 0
        self.table = table if works else None
        self.name = next((name for name, p in trainable(network).items() if p is self.table), "")
        self.optimizer, self.averages = optimizer, averages
        self.used: Tensor | None = None  # [vocabulary] bool

    def add(self, input_ids: Tensor) -> None:
        """Note the tokens of a micro-batch, int64 [b, L]."""
        if self.table is not None:
            if self.used is None:  # only now, as a checkpoint may have been loaded after __init__
                self.used = self._changed(self.table)
            self.used[input_ids] = True

    def _changed(self, table: Tensor) -> Tensor:
        """Which rows have moments, or an average other than themselves: earlier steps used them."""
        moments = [moment != 0 for moment in self._moments(table).values()]
        moved = [average[self.name] != table for average in self.averages]
        return torch.stack([numbers.any(dim=1) for numbers in (*moments, *moved)]).any(dim=0)

    def _moments(self, table: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.state.get(table, {})
        return {key: moment for key, moment in state.items() if moment.shape == table.shape}

    @contextmanager
    def only(self) -> Iterator[None]:
        """Within the block the embedding, its gradient, moments and averages have the used rows alone.

        The gradient is gone afterwards. Nothing is shrunk in the first step, which makes the moments, and where more
        than half of the rows are used.
        """
        table, used = self.table, self.used
        moments = {} if table is None else self._moments(table)
        if table is None or used is None or not moments or 2 * int(used.sum()) > len(used):
            yield
            return
        rows = used.nonzero().flatten()
        places = [(self.optimizer.state[table], key) for key in moments] + [(a, self.name) for a in self.averages]
        whole = [holder[key] for holder, key in places]
        weights, gradient = table.data, table.grad
        assert gradient is not None
        for holder, key in places:
            holder[key] = holder[key][rows]
        table.data, table.grad = weights[rows], gradient[rows]
        try:
            yield
        finally:
            table.grad = None
            weights.index_copy_(0, rows, table.data)
            table.data = weights
            for (holder, key), tensor in zip(places, whole, strict=True):
                tensor.index_copy_(0, rows, holder[key])
                holder[key] = tensor

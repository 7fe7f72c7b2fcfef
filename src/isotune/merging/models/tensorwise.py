"""The merging of full models, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from isotune.checkpoint.streaming import Entry, Shard, write_shard
from isotune.errors import CheckpointError
from isotune.linalg.change import dense
from isotune.matrix import as_matrix
from isotune.merging.contract import Aligned, Rule
from isotune.merging.models.checks import ModelInputs
from isotune.merging.models.statistics import StoredStatistics
from isotune.merging.models.unfinished import MergedTensor, Unfinished
from isotune.merging.run import Run


class Tensorwise:
    """A merge of full models into the files of an unfinished output."""

    def __init__(
        self,
        inputs: ModelInputs,
        statistics: Sequence[StoredStatistics],
        rule: Rule,
        weights: Sequence[float],
        seed: int,
        shards: Sequence[Shard],
        unfinished: Unfinished,
        advance: Callable[[int], None],
    ) -> None:
        self.inputs, self.weights, self.seed, self.shards = inputs, tuple(weights), seed, shards
        self.statistics = statistics
        self.unfinished, self.done, self.advance = unfinished, unfinished.done, advance
        self.run = Run(rule, self.sites, self.done.norms)
        self.names = tuple(model.label for model in inputs.models)

    def run_to_end(self) -> None:
        """Survey, merge, and write every file that is not there yet."""
        if all(shard.file in self.done.shards for shard in self.shards):
            return
        if not self.run.rescales or not all(n in self.done.tensors for n in self.inputs.merged):
            self.run.survey()
        if self.run.rescales:
            self.keep_changes()
        for shard in self.shards:
            if shard.file not in self.done.shards:
                path = self.unfinished.model / shard.file
                self.done.shards[shard.file] = write_shard(
                    path, shard.entries, self.written, self.inputs.origin.aliases
                )
                used = self._forget_changes(shard)
                self.unfinished.record()
                for file in used:
                    file.unlink()

    def sites(self) -> Iterator[Aligned]:
        """A walk over all tensors that some model changed."""
        for entry in self.entries():
            site = self.site(entry.name)
            if site is not None:
                yield site
            del site
            self.advance(entry.nbytes)

    def entries(self) -> Iterator[Entry]:
        """The tensors that are merged, in the order in which they are written."""
        return (entry for shard in self.shards for entry in shard.entries if entry.name in self.inputs.merged)

    def keep_changes(self) -> None:
        """Merge all changes and keep them in fp32 until the factor on them is known."""
        for number, entry in enumerate(self.entries()):
            if entry.name in self.done.tensors:
                continue
            found = self.merged(entry.name)
            if found is None:
                self.done.tensors[entry.name] = None
            else:
                self.done.tensors[entry.name] = self._keep(f"{number:06d}.safetensors", *found)
            self.unfinished.record()
            self.advance(entry.nbytes)

    def written(self, entry: Entry) -> Tensor:
        """The tensor of that entry in the output, in its shape and dtype there."""
        name, origin = entry.name, self.inputs.origin
        if name not in self.inputs.merged:
            return origin.tensor(name).to(entry.dtype)
        if self.run.rescales:
            merged, factor = self.done.tensors[name], self.run.factor
            change = self.kept(merged) if merged else None
        else:
            factor = 1.0
            found = self.merged(name)
            change, same = found or (None, None)
            merged = self.done.tensors[name] = None if found is None else MergedTensor(same)
        self.advance(entry.nbytes)
        if merged is None or change is None:
            result = origin.tensor(name)
        elif merged.same is not None and factor == 1.0:
            result = self.own(self.names.index(merged.same), name, origin.tensor(name))
        else:
            result = torch.add(origin.tensor(name), change, alpha=factor)
        result = result.to(entry.dtype)
        if result.numel() and not all(x.isfinite() for x in result.aminmax()):
            raise CheckpointError(
                f"the merged {name!r} holds values that do not fit into {entry.dtype}, or are not finite; store as "
                "bfloat16 or float32 (dtype=..., --dtype), or use smaller weights"
            )
        return result

    def _keep(self, file: str, change: Tensor, same: str | None) -> MergedTensor:
        entry = Entry("change", change.dtype, tuple(change.shape))
        return MergedTensor(same, file, write_shard(self.unfinished.changes / file, [entry], lambda _: change, {}))

    def _forget_changes(self, shard: Shard) -> list[Path]:
        """The files of changes that went into a finished file, which are not needed any more."""
        used = []
        for entry in shard.entries:
            if (merged := self.done.tensors.get(entry.name)) and merged.file:
                used.append(self.unfinished.changes / merged.file)
                self.done.tensors[entry.name] = MergedTensor(merged.same)
        return used

    def merged(self, name: str) -> tuple[Tensor, str | None] | None:
        """The merged change in the tensor's shape, and whose it is if it is one model's; None where none changed it.

        The origin's tensor is read anew where it is needed, to make room for what the rule computes.
        """
        site = self.site(name)
        if site is None:
            return None
        own = site.dense()
        change = dense(self.run.merge(site)).to(own[0].dtype)
        same = next((model for model, W in zip(site.names, own, strict=True) if change.equal(W)), None)
        return (change.mT if name in self.inputs.kinds.transposed else change).reshape(
            self.inputs.origin.headers[name].shape
        ), same

    def site(self, name: str) -> Aligned | None:
        """What the models did to a tensor, or None if none of them changed it."""
        W0 = self.inputs.origin.tensor(name)
        changes = [self.change(index, name, W0) for index in range(len(self.names))]
        if all(change is None for change in changes):
            return None
        none = next(torch.zeros_like(change) for change in changes if change is not None)
        kinds, matrix = self.inputs.kinds, name in self.inputs.kinds.matrices

        def laid(tensor: Tensor) -> Tensor:
            return as_matrix(tensor, transposed=name in kinds.transposed) if matrix else tensor

        measured = (self.measured(index, name, none) for index in range(len(self.statistics)))
        return Aligned(
            path=kinds.path(name),
            names=self.names,
            changes=tuple(laid(none if change is None else change) for change in changes),
            weights=self.weights,
            matrix=matrix,
            statistics=tuple(None if found is None else laid(found) for found in measured),
            seed=self.seed,
        )

    def measured(self, index: int, name: str, like: Tensor) -> Tensor | None:
        """A model's statistic of a tensor, in the shape and dtype of `like`; 0 in rows of tokens that it lacks."""
        found, rows = self.statistics[index].tensor(name), self.inputs.rows[index]
        if found is None or rows is None or not self.inputs.is_vocabulary(name):
            return None if found is None else found.to(like.dtype)
        mapped = torch.zeros_like(like)
        mapped[rows >= 0] = found[rows[rows >= 0]].to(like.dtype)
        return mapped

    def change(self, index: int, name: str, W0: Tensor) -> Tensor | None:
        """`W_i - W_0`, in their shape and in fp32 or better, or None if that is zero."""
        W = self.own(index, name, W0)
        if W is W0 or (W.dtype == W0.dtype and W.equal(W0)):
            return None
        exact = torch.float64 if torch.float64 in (W.dtype, W0.dtype) else torch.float32
        change = W.to(exact, copy=True).sub_(W0)
        return change if change.any() else None

    def own(self, index: int, name: str, W0: Tensor) -> Tensor:
        """A model's tensor in the shape of W0, with the rows of its tokens where the origin has them."""
        model, rows = self.inputs.models[index], self.inputs.rows[index]
        if model is self.inputs.origin:
            return W0
        W = model.tensor(name)
        if rows is None or not self.inputs.is_vocabulary(name):
            return W
        found = W0.to(torch.promote_types(W0.dtype, W.dtype), copy=True)
        found[rows >= 0] = W[rows[rows >= 0]].to(found.dtype)
        return found

    def kept(self, merged: MergedTensor) -> Tensor:
        """A merged change that was kept on disk, in the tensor's shape."""
        assert merged.file is not None
        with safe_open(self.unfinished.changes / merged.file, framework="pt") as opened:
            return opened.get_tensor("change")

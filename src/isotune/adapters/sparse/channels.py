"""Which layers make channels, and which read them: found from the paths and shapes of the layers that are adapted.

A group has layers of which each output is one channel (or part of one, where channels are heads), and the layers that
read these channels and nothing else. Three things are recognised, and what is none of them is in no group:

    chains      conv1, conv2, ... of one module, or layers of an `nn.Sequential` (named by numbers alone), each of
                which reads as many channels as the one before it gives; without grouped convolutions
    MLPs        linear layers of one shape in one module (up, or gate and up) that widen, and the one layer beside
                them that comes back (down)
    attention   q, k and v, and the layer that reads what heads give; a channel is a head or, where several heads
                have their keys and values in common, all of those. It needs the size of a head

A module may use its layers otherwise than their names say: what is masked is then trained as it is masked, and only
making the layers smaller fails.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from isotune.sites import CONVOLUTIONS, LINEAR, Site

Sites = Mapping[str, Site]

_ROLE = re.compile(r"(?:to_|w|c_)?([qkv]|query|key|value)(?:_?(?:proj|lin|layer)\w*)?", re.IGNORECASE)
_READS_HEADS = re.compile(r"(?:to_|w|c_)?(?:o|out|output|proj|dense)(?:_?(?:proj|lin|layer)\w*)?", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(\d+)")


class Channels(NamedTuple):
    """Channels of a model: paths of the layers that make them, and of those that read them."""

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    heads: int = 0
    """How many channels there are, where a channel is a head or several; else each output is one."""

    @property
    def name(self) -> str:
        """The path of the first layer that makes them."""
        return self.makers[0]


def channels(site: Site) -> int:
    """How many channels a group of the layer reads: the inputs of a linear layer, in / groups of a convolution."""
    return site.shape[1] if site.kind in CONVOLUTIONS else site.in_features


def channel_groups(sites: Sites, head_size: int | None = None) -> list[Channels]:
    """The groups among these sites, by path and in the model's order; heads only where their size is given."""
    attention = list(_attention(sites, head_size)) if head_size else []
    heads = {path for group in attention for path in (*group.makers, *group.readers)}
    others = {
        path: site
        for path, site in sites.items()
        if path not in heads and not _ATTENTION.search(_parent(path)) and not _ROLE.fullmatch(_name(path))
    }
    return [*attention, *_chains(others), *_mlps(others)]


def _attention(sites: Sites, head_size: int) -> Iterator[Channels]:
    roles: dict[str, dict[str, str]] = {}
    for path in sites:
        if found := _ROLE.fullmatch(_name(path)):
            roles.setdefault(_parent(path), {})[found[1][0].lower()] = path
    for parent, found_roles in roles.items():
        if found_roles.keys() != set("qkv"):
            continue
        makers = tuple(path for path in sites if path in found_roles.values())
        q, k, v = (sites[found_roles[role]].out_features for role in "qkv")
        around = parent if not _ATTENTION.search(_name(_parent(parent))) else _parent(parent)
        readers = [
            path
            for path, site in sites.items()
            if path.startswith(f"{around}." if around else "")
            and path not in makers
            and _READS_HEADS.fullmatch(path.removeprefix(f"{around}.").split(".")[0])
            and site.in_features == q
        ]
        if len(readers) == 1 and k == v and not k % head_size and not q % k:
            yield Channels(makers, tuple(readers), k // head_size)


def _chains(sites: Sites) -> Iterator[Channels]:
    for (path, site), (next_path, following) in itertools.pairwise(sites.items()):
        one, two = _NUMBERED.fullmatch(_name(path)), _NUMBERED.fullmatch(_name(next_path))
        if one is None or two is None or one[1] != two[1]:
            continue
        step = int(two[2]) - int(one[2])
        if step < 1 or (one[1] and step > 1):  # between conv1 and conv3 something else reads
            continue
        convolutions = site.kind == following.kind and site.kind in CONVOLUTIONS
        linear = not one[1] and {site.kind, following.kind} <= LINEAR
        if _parent(path) != _parent(next_path) or not (convolutions or linear):
            continue
        if convolutions and (site.layer.groups, following.layer.groups) != (1, 1):
            continue
        if site.out_features == channels(following):
            yield Channels((path,), (next_path,))


def _mlps(sites: Sites) -> Iterator[Channels]:
    shapes = {
        path: (site.in_features, site.out_features)
        for path, site in sites.items()
        if site.kind in LINEAR and not _name(path).isdigit()
    }
    done: set[str] = set()
    for path, (narrow, wide) in shapes.items():
        if path in done or wide <= narrow:
            continue
        makers = tuple(p for p, shape in shapes.items() if shape == (narrow, wide) and _parent(p) == _parent(path))
        done.update(makers)
        later = list(shapes)[list(shapes).index(path) :]
        back = [p for p in later if shapes[p] == (wide, narrow)]
        readers = [p for p in back if _parent(p) == _parent(path)] or [
            p
            for p in back
            if _around(p) == _around(path)  # intermediate.dense, output.dense
        ]
        if len(readers) == 1:
            yield Channels(makers, tuple(readers))


def _around(path: str) -> str:
    """What the module of the layer is in, where that is no numbered block; else the layer itself."""
    parent = _parent(path)
    return path if not parent or _name(parent).isdigit() else _parent(parent)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _name(path: str) -> str:
    return path.rpartition(".")[2]

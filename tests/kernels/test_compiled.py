"""The kernels compile for GPUs, which takes none, and keep their numbers in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = r"""
import json, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from isotune.kernels import cayley, wy, wy_tiled

capability, found = int(sys.argv[1]), {}
small = {"R": 32, "BD": 64, "n": 64, "LEVELS": 5, "STEPS": 2}
tiled = {"R": 128, "T": 32, "BD": 64, "n": 4, "LEVELS": 5, "STEPS": 2, "HALF": 2}
kernels = [(kernel, small) for kernel in (wy.gram, wy.forward, wy.sums, wy.backward)]
kernels += [(kernel, {"B": 32}) for kernel in (cayley.forward, cayley.backward)]
kernels += [(getattr(wy_tiled, name), tiled) for name in (
    "gram_tiles", "sum_and_invert", "join", "forward_tiles", "sums_tiles", "left", "symmetric", "backward_tiles")]
for kernel, sizes in kernels:
    names = kernel.arg_names
    constants = {(i,): sizes[n] for i, n in enumerate(names) if n in sizes}
    half = ("UNIT", "MT", "GU", "GM")
    kinds = {n: "*bf16" if n in half else "i32" if n in ("d", "r", "K", "b") else "*fp32" for n in names}
    kinds |= {n: "constexpr" for n in names if n in sizes}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    warps = 8 if kernel in (wy.forward, wy.backward) else 4  # as they are launched
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    file = sys.argv[2] + "/in.ptx"
    with open(file, "w") as out:
        out.write(made.asm["ptx"])
    arch = re.findall(r"\.target (\w+)", made.asm["ptx"])[0]
    command = [get_ptxas(capability).path, "-v", "-arch=" + arch, "-o", sys.argv[2] + "/out", file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", said)[0]
    found[kernel.__module__ + "." + kernel.__name__] = {"spilled": int(spilled), "shared": made.metadata.shared}
print(json.dumps(found))
"""


def test_every_kernel_compiles_and_spills_little(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    arguments = [sys.executable, "-c", COMPILE, "90", str(tmp_path)]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 14
    for name, used in found.items():
        assert used["spilled"] <= 128, (name, used)
        assert used["shared"] <= 100 * 1024, (name, used)

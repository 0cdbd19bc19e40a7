"""Kernels with one mistake each: the machine must say so, and not of the kernel without it."""

import zlib

import numpy as np
import pytest

from endor.kernels import gpu_build
from endor.kernels.gpu_launch import Kernel, Launch

from .memory import Fault
from .simulator import Simulator

SOURCE = """
struct Arguments {{ const unsigned* in; unsigned* out; }};
__device__ __forceinline__ void copy16(void* to, const void* from) {{
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}}
extern "C" __global__ void broken(const __grid_constant__ Arguments a) {{
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned* words = (unsigned*)shared;
  unsigned t = threadIdx.x;
  {body}
}}
"""

WORDS = 64

SOUND = {
    "exchange": "words[t] = a.in[t]; __syncthreads(); a.out[t] = words[63 - t];",
    "shuffle": "a.out[t] = words[t] = __shfl_xor_sync(~0u, a.in[t], 5);",
    "copy": """if (t < 16) copy16(words + 4 * t, a.in + 4 * t);
      asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
      __syncthreads(); a.out[t] = words[t];""",
    "output": "a.out[t] = a.in[t]; __syncthreads(); unsigned v = a.out[63 - t]; __syncthreads(); "
    "a.out[t] = v;",
    "parting": """unsigned v = a.in[t];
      if (v & 1) v = v * 3; else for (unsigned i = 0; i < v; i++) v -= i & 1;
      __syncwarp(); a.out[t] = v + __shfl_sync(~0u, v, 3);""",
}
"""Kernels without a mistake, and what they must compute."""

BROKEN = {
    "no barrier": (
        "words[t] = a.in[t]; __syncwarp(); a.out[t] = words[63 - t];",
        "another one has just written|nobody has written",
    ),
    "read, then overwritten": (
        """words[t] = a.in[t]; __syncthreads(); unsigned v = words[63 - t]; __syncwarp();
           words[t] = v + 1; __syncthreads(); a.out[t] = words[t];""",
        "another one has just read|another one has just written",
    ),
    "two warps, one word": ("words[t & 31] = t; a.out[t] = words[t & 31];", "two warps write"),
    "two lanes, one word": ("words[t & 32] = t; a.out[t] = words[t & 32];", "two lanes write"),
    "unwritten": ("if (t < 32) words[t] = 1; __syncthreads(); a.out[t] = words[t];", "nobody has"),
    "past the end of shared memory": ("words[t + 1] = t; a.out[t] = words[t + 1];", "byte 256 of"),
    "past the end of the input": ("a.out[t] = a.in[t + 1];", "outside the arrays"),
    "into the input": ("((unsigned*)a.in)[t] = t;", "a store into an input"),
    "two warps, one output": ("a.out[t & 31] = t;", "two warps write"),
    "another warp's output": (
        "a.out[t] = t; __syncwarp(); a.out[t ^ 32] += 1;",
        "output that another one has written|two warps write",
    ),
    "misaligned": ("a.out[t] = *(unsigned*)((char*)a.in + t);", "misaligned"),
    "misaligned in shared memory": (
        "words[t] = 0; __syncthreads(); a.out[t] = *(unsigned*)(shared + t);",
        "misaligned",
    ),
    "copy without a wait": (
        """if (t < 16) copy16(words + 4 * t, a.in + 4 * t);
           asm volatile("cp.async.commit_group;" ::: "memory"); __syncthreads();
           a.out[t] = words[t];""",
        "nobody has written",
    ),
    "part of a warp shuffles": (
        "if (a.in[t] & 1) a.out[t] = __shfl_xor_sync(~0u, t, 1);",
        "lanes of a warp|parted",
    ),
    "barrier for some": (
        "if (a.in[t] & 1) __syncthreads(); a.out[t] = __shfl_xor_sync(~0u, t, 1);",
        "deadlock|lanes of a warp|parted",
    ),
}


ARGUMENTS = np.array([1 << 40, 1 << 41], dtype=np.uint64)


def kernel(body: str) -> Kernel:
    """One for each body, so that none is taken for another."""
    return Kernel("broken", (("BODY", zlib.crc32(body.encode())),))  # type: ignore[arg-type]


def counted_down(v: int) -> int:
    i = 0
    while i < v:
        v, i = v - (i & 1), i + 1
    return v


def run(simulator: Simulator, monkeypatch: pytest.MonkeyPatch, body: str, architecture: str):
    monkeypatch.setattr(gpu_build, "source", lambda name: SOURCE.format(body=body))
    data = np.arange(WORDS, dtype=np.uint32).view(np.uint8)
    out = np.full(4 * WORDS, 0xA5, dtype=np.uint8)
    launch = Launch(kernel(body), ARGUMENTS, 1, WORDS, 4 * WORDS)
    simulator.launch(launch, architecture, [(1 << 40, data)], [(1 << 41, out)])
    return out.view(np.uint32)


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_found(simulator, monkeypatch, name, architecture):
    body, what = BROKEN[name]
    with pytest.raises(Fault, match=what):
        run(simulator, monkeypatch, body, architecture)


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_what_is_right_passes(simulator, monkeypatch, architecture):
    t = np.arange(WORDS)
    assert (run(simulator, monkeypatch, SOUND["exchange"], architecture) == 63 - t).all()
    assert (run(simulator, monkeypatch, SOUND["shuffle"], architecture) == t ^ 5).all()
    assert (run(simulator, monkeypatch, SOUND["copy"], architecture) == t).all()
    assert (run(simulator, monkeypatch, SOUND["output"], architecture) == 63 - t).all()
    v = np.array([3 * n if n & 1 else counted_down(n) for n in t])
    assert (run(simulator, monkeypatch, SOUND["parting"], architecture) == v + v[t & 32 | 3]).all()


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])
def test_conflicts_of_banks_cost(simulator, monkeypatch, architecture):
    """Lanes 16 bytes apart take 4 cycles where neighbours take one."""
    costs = []
    for factor in (1, 4):
        body = f"words[{factor} * t] = t; a.out[t] = words[{factor} * t];"
        monkeypatch.setattr(gpu_build, "source", lambda name, body=body: SOURCE.format(body=body))
        out = np.zeros(256, dtype=np.uint8)
        launch = Launch(kernel(body), ARGUMENTS, 1, WORDS, 4 * 256)
        costs.append(simulator.launch(launch, architecture, [], [(1 << 41, out)])["wavefronts"])
    assert costs[1] == 4 * costs[0] > 0

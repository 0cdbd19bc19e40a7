"""Instructions that reach memory, and what lanes exchange."""

import numpy as np

from .machine import Machine, executes
from .memory import Fault, bytes_of, words_of
from .program import Instruction, Operand

LANES = np.arange(32)
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def size_of(i: Instruction) -> int:
    return next((SIZES[item] for item in i.modifiers if item in SIZES), 4)


def lanes_of(m: Machine, at: np.ndarray, acting: np.ndarray) -> tuple[np.ndarray, ...]:
    """Addresses, rows (warps of the machine) and lanes of those that act."""
    rows, lanes = np.nonzero(acting)
    return np.broadcast_to(at, acting.shape)[acting], rows, lanes


def put(m: Machine, target: Operand, data: np.ndarray, acting: np.ndarray, i: Instruction) -> None:
    if target.index < 0:
        return
    words = words_of(data, i.modifiers)
    for register in range(words.shape[1]):
        m.R[target.index + register][acting] = words[:, register]


def take(m: Machine, source: Operand, size: int, acting: np.ndarray) -> np.ndarray:
    count = max(size // 4, 1)
    if source.index < 0:
        return np.zeros((int(acting.sum()), size), dtype=np.uint8)
    file = m.R if source.kind == "R" else m.UR
    rows = [np.broadcast_to(file[source.index + k], acting.shape)[acting] for k in range(count)]
    return bytes_of(np.stack(rows, axis=1), size)


@executes("LDG")
def load_global(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    at, rows, _ = lanes_of(m, m.sum(i.operands[1]), acting)
    m.costs.global_access("read", at, rows)
    put(m, i.operands[0], m.memory.read(at, size_of(i), m.number[rows]), acting, i)


@executes("STG")
def store_global(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    at, rows, _ = lanes_of(m, m.sum(i.operands[0]), acting)
    m.costs.global_access("written", at, rows)
    m.memory.write(at, take(m, i.operands[1], size_of(i), acting), m.number[rows])


def shared_place(m: Machine, i: Instruction, operand: Operand, size: int, acting: np.ndarray):
    at, rows, lanes = lanes_of(m, m.sum(operand) & np.uint64(0xFFFFFFFF), acting)
    m.costs.shared_access(at, size, rows, lanes)
    return m.shared.place(at, size, m.block[rows]), rows


@executes("LDS")
def load_shared(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    index, rows = shared_place(m, i, i.operands[1], size_of(i), acting)
    put(m, i.operands[0], m.shared.read(index, m.warp[rows]), acting, i)


@executes("STS")
def store_shared(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    size = size_of(i)
    index, rows = shared_place(m, i, i.operands[0], size, acting)
    m.shared.write(index, take(m, i.operands[1], size, acting), m.warp[rows])


@executes("LDL", "STL")
def spill(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    size, loads = size_of(i), i.name == "LDL"
    operand = i.operands[1 if loads else 0]
    at, rows, lanes = lanes_of(m, m.sum(operand) & np.uint64(0xFFFFFFFF), acting)
    index = at.astype(np.int64)[:, None] + np.arange(size)
    if (index < 0).any() or (index >= m.local.shape[2]).any():
        raise Fault("outside of the frame")
    if loads:
        put(m, i.operands[0], m.local[rows[:, None], lanes[:, None], index], acting, i)
    else:
        m.local[rows[:, None], lanes[:, None], index] = take(m, i.operands[1], size, acting)


@executes("LDGSTS")
def copy(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """cp.async: the bytes come when they are waited for; until then their place holds nothing."""
    if size_of(i) != 16:
        raise Fault("only copies of 16 bytes are known")
    at, rows, _ = lanes_of(m, m.sum(i.operands[1]), acting)
    m.costs.global_access("read", at, rows)
    data = m.memory.read(at, 16, m.number[rows])
    index, rows = shared_place(m, i, i.operands[0], 16, acting)
    m.shared.spoil(index, m.warp[rows])
    for row in np.unique(rows):
        m.open[row].append((index[rows == row], data[rows == row]))


@executes("LDGDEPBAR")
def commit(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.whole(acting)
    for row in np.flatnonzero(acting.any(1)):
        m.groups[row].append(m.open[row])
        m.open[row] = []


@executes("DEPBAR")
def arrive(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.whole(acting)
    if i.operands[0].text != "SB0":
        raise Fault("counter of copies")
    for row in np.flatnonzero(acting.any(1)):
        while len(m.groups[row]) > i.operands[1].index:
            for index, data in m.groups[row].pop(0):
                m.shared.write(index, data, np.full(len(index), m.warp[row]))


@executes("SHFL")
def exchange(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.whole(acting)
    found, target, source, by = i.operands[:4]
    value = np.broadcast_to(m.value(source), acting.shape)
    distance = np.broadcast_to(m.value(by), acting.shape).astype(np.int64) & 31
    lanes = np.broadcast_to(LANES, acting.shape)
    (kind,) = i.modifiers
    if kind == "IDX":
        pick, inside = distance, np.ones_like(acting)
    elif kind == "BFLY":
        pick, inside = lanes ^ distance, np.ones_like(acting)
    else:
        pick = lanes - distance if kind == "UP" else lanes + distance
        inside = (pick >= 0) & (pick < 32)
        pick = np.where(inside, pick, lanes)
    out = np.take_along_axis(value, pick, axis=1)
    m.set(target, out, acting)
    m.set_predicate(found, inside, acting)


@executes("VOTE", "VOTEU")
def vote(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Ballot of a predicate into a register, and whether any or all are set."""
    m.whole(acting)
    target = next((item for item in i.operands if item.kind in ("R", "UR")), None)
    given = [item for item in i.operands if item.kind in ("P", "UP")]
    held = np.broadcast_to(m.predicate(given[-1]), acting.shape)
    if target is not None:
        bits = (held.astype(np.uint64) << LANES.astype(np.uint64)).sum(1, keepdims=True)
        m.set(target, np.broadcast_to(bits, acting.shape), acting)
    joined = held.all(1, keepdims=True) if i.has("ALL") else held.any(1, keepdims=True)
    if len(given) > 1:
        m.set_predicate(given[0], np.broadcast_to(joined, acting.shape), acting)


@executes("REDUX")
def reduce(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.whole(acting)
    value = np.broadcast_to(m.value(i.operands[1]), acting.shape).astype(np.uint64)
    if not i.has("SUM"):
        raise Fault("form of reduction")
    total = value.sum(1, keepdims=True) & np.uint64(0xFFFFFFFF)
    m.set(i.operands[0], np.broadcast_to(total, acting.shape), acting)

"""Instructions on integers and predicates, in vector and uniform registers alike."""

import numpy as np

from .machine import Machine, executes
from .memory import Fault
from .program import Instruction, Operand

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def u64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint64)


def split(i: Instruction, first: int) -> tuple[list[Operand], list[Operand]]:
    """Operands from `first` on: the predicates that lead, and the rest."""
    at = first
    while at < len(i.operands) and i.operands[at].kind in ("P", "UP"):
        at += 1
    return list(i.operands[first:at]), list(i.operands[at:])


@executes("NOP", "ENDCOLLECTIVE", "YIELD")
def nothing(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """No effect on results."""


@executes("MOV", "UMOV")
def move(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.set(i.operands[0], m.value(i.operands[1]), acting)


@executes("S2R", "S2UR", "CS2R")
def special(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    target, name = i.operands[0], i.operands[1].text
    values = {
        "SR_TID.X": m.thread,
        "SR_CTAID.X": m.block_index,
        "SR_LANEID": m.thread & np.uint32(31),
        "SR_CgaCtaId": np.zeros((1, 1), dtype=np.uint32),
        "SRZ": np.zeros((1, 1), dtype=np.uint32),
    }
    if name not in values:
        raise Fault(f"special register {name}")
    if i.name == "CS2R" and not i.has("32"):
        m.set_wide(target, u64(values[name]), acting)
    else:
        m.set(target, values[name], acting)


@executes("LDC", "ULDC")
def load_constant(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    target, source = i.operands
    if i.has("64"):
        m.set_wide(target, m.constant(source, 8), acting)
    elif i.modifiers in ((), ("U8",), ("U16",)):
        size = {"": 4, "U8": 1, "U16": 2}[i.modifiers[0] if i.modifiers else ""]
        m.set(target, m.constant(source, size).astype(np.uint32), acting)
    else:
        raise Fault("form of constant load")


@executes("R2UR")
def to_uniform(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.set(i.operands[-2], m.value(i.operands[-1]), acting)


@executes("IADD3", "UIADD3")
def add(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Up to three operands; predicates take and give carries."""
    carries, rest = split(i, 1)
    total = np.zeros((1, 1), dtype=np.uint64)
    for operand in rest[:3]:
        if operand.negate:
            total = total + u64(~m.bits(operand)) + np.uint64(1)
        else:
            total = total + u64(m.value(operand))
    if i.has("X"):
        for operand in rest[3:]:
            total = total + u64(m.predicate(operand))
    m.set(i.operands[0], total & LOW, acting)
    for at, carry in enumerate(carries):
        m.set_predicate(carry, total >> HALF > at, acting)


@executes("VIADD")
def add_two(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.set(i.operands[0], m.value(i.operands[1]) + m.value(i.operands[2]), acting)


@executes("IMAD", "UIMAD")
def multiply_add(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    target = i.operands[0]
    carries, (a, b, c, *carry) = split(i, 1)
    if carries:
        raise Fault("carry out of a product")
    left, right = u64(m.value(a)), u64(m.value(b))
    if i.has("WIDE"):
        if not i.has("U32"):
            left = left.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)
            right = right.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)
        m.set_wide(target, left * right + m.wide(c), acting)
    elif i.has("HI"):
        if not i.has("U32"):
            raise Fault("signed high product")
        m.set(target, left * right + m.wide(c) >> HALF, acting)
    else:
        total = left * right + u64(m.value(c))
        if i.has("X"):
            total = total + u64(m.predicate(carry[0]))
        m.set(target, total & LOW, acting)


def _compare(i: Instruction, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    tests = {
        "GE": np.greater_equal,
        "GT": np.greater,
        "LT": np.less,
        "LE": np.less_equal,
        "EQ": np.equal,
        "NE": np.not_equal,
    }
    return tests[i.modifiers[0]](a, b)


@executes("ISETP", "UISETP")
def compare(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Compare, `.EX` after the lower halves, and join with a predicate."""
    a, b = m.value(i.operands[2]), m.value(i.operands[3])
    if not i.has("U32"):
        a, b = a.view(np.int32), b.view(np.int32)
    found = _compare(i, a, b)
    if i.has("EX"):
        below = m.predicate(i.operands[5])
        kind = i.modifiers[0]
        if kind == "NE":
            found = found | below
        elif kind == "EQ":
            found = found & below
        else:
            strict = a > b if kind in ("GE", "GT") else a < b
            found = strict | ((a == b) & below)
    other = m.predicate(i.operands[4])
    join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
    (how,) = [join[name] for name in i.modifiers if name in join]
    m.set_predicate(i.operands[0], how(found, other), acting)
    m.set_predicate(i.operands[1], how(~found, other), acting)


def _table(table: int, inputs: list[np.ndarray]) -> np.ndarray:
    a, b, c = inputs
    out = a & ~a & b & c
    for row in range(8):
        if table >> row & 1:
            out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return out


@executes("LOP3", "ULOP3")
def logic(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    leading, rest = split(i, 0)
    target, a, b, c, table, *joined = rest
    out = _table(table.index, [m.value(item) for item in (a, b, c)])
    m.set(target, out, acting)
    if leading:
        m.set_predicate(leading[0], (out != 0) | m.predicate(joined[0]), acting)


@executes("PLOP3", "UPLOP3")
def predicate_logic(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    inputs = [m.predicate(item) for item in i.operands[2:5]]
    m.set_predicate(i.operands[0], _table(i.operands[5].index, inputs), acting)
    m.set_predicate(i.operands[1], _table(i.operands[6].index, inputs), acting)


@executes("R2P")
def to_predicates(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    value, chosen = m.value(i.operands[1]), i.operands[2].index
    for bit in range(7):
        if chosen >> bit & 1:
            m.set_predicate(Operand("P", bit), (value >> np.uint32(bit) & 1).astype(bool), acting)


@executes("P2R")
def from_predicates(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Predicates as bits, where the mask says; the other bits from a register."""
    if i.modifiers:
        raise Fault("form of predicates to register")
    rest, chosen = m.value(i.operands[-2]), np.uint32(i.operands[-1].index)
    bits = np.zeros_like(m.R[0])
    for bit in range(7):
        bits |= m.P[bit].astype(np.uint32) << np.uint32(bit)
    m.set(i.operands[0], (bits & chosen) | (rest & ~chosen), acting)


@executes("SHF", "USHF")
def shift(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Shift the 64 bits of two registers and keep one half."""
    low, by, high = (m.value(item) for item in i.operands[1:4])
    by = u64(by)
    signed, wide = i.has("S32") or i.has("S64"), i.has("U64") or i.has("S64")
    by = by & np.uint64(31) if i.has("W") else np.minimum(by, np.uint64(63 if wide else 32))
    both = u64(low) | u64(high) << HALF
    if i.has("L"):
        out = both << by
    elif signed:
        out = (both.view(np.int64) >> by.view(np.int64)).view(np.uint64)
    else:
        out = both >> by
    m.set(i.operands[0], out >> HALF if i.has("HI") else out & LOW, acting)


@executes("LEA", "ULEA")
def scaled_add(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    carries, rest = split(i, 1)
    a, b = u64(m.value(rest[0])), m.value(rest[1])
    if i.has("HI"):
        a = a | u64(m.value(rest[2])) << HALF
        by, joined = np.uint64(rest[3].index), rest[4:]
        total = ((a << by) >> HALF) + u64(b)
        if i.has("X"):
            total = total + u64(m.predicate(joined[0]))
    else:
        by = np.uint64(rest[2].index)
        if rest[0].negate:  # of what is shifted, so that 0 carries as in IADD3
            total = (~(u64(m.bits(rest[0])) << by) & LOW) + np.uint64(1) + u64(b)
        else:
            total = (a << by & LOW) + u64(b)
    m.set(i.operands[0], total & LOW, acting)
    if carries:
        m.set_predicate(carries[0], total >> HALF > 0, acting)


@executes("SEL", "USEL", "FSEL")
def select(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    a, b = m.value(i.operands[1]), m.value(i.operands[2])
    m.set(i.operands[0], np.where(m.predicate(i.operands[3]), a, b), acting)


def _least_or_most(m: Machine, i: Instruction, a: np.ndarray, b: np.ndarray, which: Operand):
    if not i.has("U32"):
        a, b = a.view(np.int32), b.view(np.int32)
    return np.where(m.predicate(which), np.minimum(a, b), np.maximum(a, b)).view(np.uint32)


@executes("VIMNMX", "IMNMX", "UIMNMX")
def least(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    a, b = m.value(i.operands[1]), m.value(i.operands[2])
    m.set(i.operands[0], _least_or_most(m, i, a, b, i.operands[3]), acting)


@executes("VIMNMX3")
def least_of_three(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    a, b, c = (m.value(item) for item in i.operands[1:4])
    two = _least_or_most(m, i, a, b, i.operands[4])
    m.set(i.operands[0], _least_or_most(m, i, two, c, i.operands[4]), acting)


@executes("VIADDMNMX")
def add_least(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    total = m.value(i.operands[1]) + m.value(i.operands[2])
    m.set(i.operands[0], _least_or_most(m, i, total, m.value(i.operands[3]), i.operands[4]), acting)


@executes("POPC", "UPOPC")
def count_bits(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    m.set(i.operands[0], np.bitwise_count(m.value(i.operands[1])), acting)


@executes("FLO", "UFLO")
def leading_bit(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    value = m.value(i.operands[-1])
    if not i.has("U32") or i.has("SH"):
        raise Fault("form of leading bit")
    position = np.frexp(value.astype(np.float64))[1] - 1
    m.set(i.operands[0], np.where(value == 0, 0xFFFFFFFF, position).astype(np.uint32), acting)


@executes("BREV")
def reverse(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    value = m.value(i.operands[1])
    out = np.zeros_like(value)
    for bit in range(32):
        out |= (value >> np.uint32(bit) & np.uint32(1)) << np.uint32(31 - bit)
    m.set(i.operands[0], out, acting)


@executes("PRMT")
def permute(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    a, selector, b = (m.value(item) for item in i.operands[1:4])
    both = u64(a) | u64(b) << HALF
    out = np.zeros((1, 1), dtype=np.uint64)
    for at in range(4):
        pick = u64(selector >> np.uint32(4 * at) & np.uint32(15))
        byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7) > 0, np.uint64(255), np.uint64(0))
        out = out | np.where(pick > 7, sign, byte) << np.uint64(8 * at)
    m.set(i.operands[0], out, acting)

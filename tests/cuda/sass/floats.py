"""Instructions on floats, among them the tensor cores' product."""

import numpy as np

from .machine import Machine, executes
from .memory import Fault
from .program import Instruction, Operand


def number(m: Machine, operand: Operand) -> np.ndarray:
    out = m.bits(operand).view(np.float32)
    if operand.absolute:
        out = np.abs(out)
    return -out if operand.negate else out


def put(m: Machine, i: Instruction, value: np.ndarray, acting: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        m.set(i.operands[0], value.astype(np.float32).view(np.uint32), acting)


@executes("FADD")
def add(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        put(m, i, number(m, i.operands[1]) + number(m, i.operands[2]), acting)


@executes("FMUL")
def multiply(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        put(m, i, number(m, i.operands[1]) * number(m, i.operands[2]), acting)


@executes("FFMA")
def multiply_add(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """The product is exact in float64; the sum is rounded twice, now and then one bit off."""
    a, b, c = (number(m, item).astype(np.float64) for item in i.operands[1:4])
    with np.errstate(over="ignore", invalid="ignore"):
        put(m, i, a * b + c, acting)


@executes("FSETP")
def compare(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    a, b = number(m, i.operands[2]), number(m, i.operands[3])
    kind = i.modifiers[0]
    unordered = np.isnan(a) | np.isnan(b)
    tests = {"NAN": unordered, "NUM": ~unordered, "NEU": ~(a == b), "EQ": a == b, "GT": a > b}
    tests |= {"LT": a < b, "GE": a >= b, "LE": a <= b}
    if kind not in tests or not i.has("AND"):
        raise Fault("form of comparison")
    m.set_predicate(i.operands[0], tests[kind] & m.predicate(i.operands[4]), acting)


@executes("I2F", "I2FP")
def from_integer(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    value = m.value(i.operands[1])
    narrow = {"U8": 0xFF, "U16": 0xFFFF}
    if {"S8", "S16", "F64"} & set(i.modifiers) or ".B" in i.operands[1].text:
        raise Fault("form of conversion")
    for name, mask in narrow.items():
        if i.has(name):
            value = value & np.uint32(mask)
    unsigned = i.has("U32") or any(i.has(name) for name in narrow)
    exact = (value if unsigned else value.view(np.int32)).astype(np.float64)
    out = exact.astype(np.float32)
    if i.has("RP"):
        below = out.astype(np.float64) < exact
        out = np.where(below, np.nextafter(out, np.float32(np.inf)), out)
    put(m, i, out, acting)


@executes("F2I")
def to_integer(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    if not {"U32", "TRUNC"} <= set(i.modifiers):
        raise Fault("form of conversion")
    value = number(m, i.operands[1])
    value = np.where(np.isnan(value), np.float32(0), value).astype(
        np.float64
    )  # a NaN becomes 0; so may what idle lanes hold
    m.set(i.operands[0], np.clip(np.trunc(value), 0, 2**32 - 1).astype(np.uint64), acting)


@executes("F2F", "F2FP")
def narrow(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """To 16 bits, one value or two: the last operand goes into the lower half."""
    *high, low = i.operands[1:]
    halves = []
    for operand in (low, *high):
        value = number(m, operand)
        if i.has("BF16"):
            u = value.view(np.uint32)
            rounded = u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
            halves.append(np.where(np.isnan(value), np.uint32(0x7FFF), rounded))
        else:
            with np.errstate(over="ignore"):
                halves.append(value.astype(np.float16).view(np.uint16).astype(np.uint32))
    out = halves[0] if len(halves) == 1 else halves[0] | halves[1] << np.uint32(16)
    m.set(i.operands[0], out, acting)


@executes("HADD2")
def widen_half(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Only `HADD2.F32 R, -RZ, R.H0_H0`, which is how a half becomes a float."""
    if not i.has("F32"):
        raise Fault("form of half addition")
    name = i.operands[-1].text
    register = int(name[1:].partition(".")[0])
    bits = m.R[register] >> np.uint32(16 if "H1_H1" in name else 0)
    put(m, i, bits.astype(np.uint16).view(np.float16).astype(np.float32), acting)


@executes("HFMA2")
def half_constant(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """Only `HFMA2.MMA R, -RZ, RZ, high, low`, which is how two halves become a constant."""
    if len(i.operands) != 5 or any(item.index >= 0 for item in i.operands[1:3]):
        raise Fault("half product")
    high, low = (int(np.float16(item.text).view(np.uint16)) for item in i.operands[3:])
    m.set(i.operands[0], np.full((1, 1), high << 16 | low, dtype=np.uint32), acting)


@executes("MUFU")
def reciprocal(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    if not i.has("RCP"):
        raise Fault("special function")
    with np.errstate(all="ignore"):
        put(m, i, np.float32(1) / number(m, i.operands[1]), acting)


@executes("HMMA")
def tensor_core(m: Machine, i: Instruction, acting: np.ndarray) -> None:
    """m16n8k16 with float32 sums; lane 4 g + t holds what PTX's manual says."""
    m.whole(acting)
    if not i.has("16816") or not i.has("F32"):
        raise Fault("shape of tensor-core product")
    target, a, b, c = (item.index for item in i.operands)
    count = acting.shape[0]

    def halves(register: int) -> np.ndarray:
        """`(warps, g, t, 2)` floats."""
        words = m.R[register].reshape(count, 8, 4)
        both = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
        if i.has("BF16"):
            with np.errstate(invalid="ignore"):
                return (both << np.uint32(16)).view(np.float32).astype(np.float64)
        return both.astype(np.uint16).view(np.float16).astype(np.float64)

    left = np.empty((count, 2, 8, 2, 4, 2))  # row high, g, k high, t, half
    for at in range(4):
        left[:, at & 1, :, at >> 1] = halves(a + at)
    right = np.empty((count, 2, 4, 2, 8))  # k high, t, half, g
    for at in range(2):
        right[:, at] = halves(b + at).transpose(0, 2, 3, 1)
    sums = np.zeros((count, 2, 8, 4, 2))  # row high, g, t, column low
    with np.errstate(invalid="ignore", over="ignore"):  # what stands in other warps' registers
        for at in range(4) if c >= 0 else ():
            sums[:, at >> 1, :, :, at & 1] = m.R[c + at].view(np.float32).reshape(count, 8, 4)
        product = left.reshape(count, 16, 16) @ right.reshape(count, 16, 8)
        sums += product.reshape(sums.shape)
        single = sums.astype(np.float32).view(np.uint32)
    for at in range(4):
        part = single[:, at >> 1, :, :, at & 1].reshape(count, 32)
        np.copyto(m.R[target + at], part, where=acting)

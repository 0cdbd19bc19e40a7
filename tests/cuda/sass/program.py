"""Machine code of one kernel: what NVIDIA's disassembler and the cubin's own sections say of it."""

import functools
import json
import re
import shutil
import struct
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STEP = 16
"""Bytes of an instruction."""

EIATTR_PARAM_CBANK = 0x0A
"""Record of `.nv.info.<kernel>` that says where in constant bank 0 the arguments begin."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand.

    Attributes:
        kind: `R` and `UR` (registers), `P` and `UP` (predicates), `imm`, `float`, `const` (a
            constant bank), `at` (an address), or `name` for anything else.
        index: Number of the register or predicate, -1 for RZ and URZ; the immediate; the bank.
        negate, invert, absolute: What is done to the value; `invert` is also a predicate's `!`.
        terms: Registers that an address adds up: (kind, number, `.64`, factor).
        text: As it was written.
    """

    kind: str
    index: int = 0
    negate: bool = False
    invert: bool = False
    absolute: bool = False
    terms: tuple[tuple[str, int, bool, int], ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `guard opcode.modifiers operands`."""

    pc: int
    guard: Operand | None
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel's instructions and what the loader would put around them.

    Attributes:
        instructions: In order; instruction `i` stands at `16 * i`.
        arguments_at: Offset of the arguments in constant bank 0.
        constants: Bank 2, the compiler's own.
        shared_base: Where dynamic shared memory begins.
    """

    name: str
    instructions: tuple[Instruction, ...]
    arguments_at: int
    constants: np.ndarray
    shared_base: int


@functools.cache
def disassembler() -> str | None:
    """Return the path of `nvdisasm`: that of the wheel nvidia-cuda-nvdisasm, or the system's."""
    root = Path(sysconfig.get_path("purelib"), "nvidia")
    places = sorted(root.glob("cu*/bin/nvdisasm")) + sorted(root.glob("*/bin/nvdisasm"))
    if not places:
        import importlib.util

        spec = importlib.util.find_spec("nvidia")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            places += sorted(Path(folder).glob("*/bin/nvdisasm"))
    return str(places[-1]) if places else shutil.which("nvdisasm")


def load(cubin: bytes, folder: Path) -> Program:
    """Return the only kernel of `cubin`; `folder` takes a scratch file."""
    tool = disassembler()
    assert tool is not None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    done = subprocess.run([tool, "-json", str(path)], capture_output=True, text=True, check=True)
    (function,) = json.loads(done.stdout)[1]
    name = function["function-name"]
    sections = _sections(cubin)
    return Program(
        name,
        tuple(_instruction(i * STEP, item) for i, item in enumerate(function["sass-instructions"])),
        _arguments_at(sections[f".nv.info.{name}"][0]),
        np.frombuffer(sections.get(f".nv.constant2.{name}", (b"", 0))[0], dtype=np.uint8),
        sections.get(f".nv.shared.{name}", (b"", 0))[1],
    )


def _sections(cubin: bytes) -> dict[str, tuple[bytes, int]]:
    """Contents and size of each section of an ELF file of 64 bits; NOBITS sections have none."""
    at, names_index = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<H", cubin, 62)[0]
    size, count = struct.unpack_from("<HH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    names = heads[names_index]
    found = {}
    for name_at, kind, _flags, _address, offset, length in heads:
        begin = names[4] + name_at
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        found[name] = (b"" if kind == 8 else cubin[offset : offset + length], length)
    return found


def _arguments_at(info: bytes) -> int:
    at = 0
    while at < len(info):
        form, attribute = info[at], info[at + 1]
        if attribute == EIATTR_PARAM_CBANK:
            return int(struct.unpack_from("<IHH", info, at + 4)[1])
        at += 4 + (struct.unpack_from("<H", info, at + 2)[0] if form == 4 else 0)
    raise ValueError("the cubin does not say where its arguments are")


def _instruction(pc: int, item: dict[str, str]) -> Instruction:
    name, *modifiers = item["opcode"].split(".")
    guard, written = item.get("predicate", ""), item.get("operands", "")
    if guard.strip() == "PR":  # of P2R: all predicates, not one that guards
        guard = ""
    operands = tuple(_operand(text) for text in _split(written))
    return Instruction(
        pc,
        _operand(guard.strip().removeprefix("@")) if guard else None,
        name,
        tuple(modifiers),
        tuple(operand for operand in operands if operand.text),
        f"{pc:#x}: {guard} {item['opcode']} {written}",
    )


def _split(text: str) -> list[str]:
    """Operands: at commas outside of brackets, and between two addresses."""
    text = re.sub(r"desc\[\w+\]", "", text.replace(".reuse", "")).replace("][R", "],[R")
    text = text.replace("c[0x0],[", "c[0x0][").replace("c[0x2],[", "c[0x2][")
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def _operand(text: str) -> Operand:
    body, negate, invert, absolute = text, False, False, False
    if body[:1] == "-" and not re.match(r"-(0x|[\d.])", body):
        negate, body = True, body[1:]
    if body[:1] in "!~" and body:
        invert, body = True, body[1:]
    if body[:1] == "|":
        absolute, body = True, body.strip("|")
    fields = {"negate": negate, "invert": invert, "absolute": absolute, "text": text}
    if match := re.fullmatch(r"(UR|R|UP|P)(\d+|Z|T)", body):
        kind, number = match.groups()
        index = {"Z": -1, "T": 7}[number] if number in "ZT" else int(number)
        return Operand(kind, index, **fields)
    if body.startswith("c["):
        bank, inner = re.fullmatch(r"c\[(\w+)\]\[(.*)\]", body).groups()  # type: ignore[union-attr]
        return Operand("const", int(bank, 16), terms=_terms(inner), **fields)
    if body.startswith("["):
        return Operand("at", terms=_terms(body[1:-1]), **fields)
    if re.fullmatch(r"-?0x[0-9a-f]+", body):
        return Operand("imm", int(body, 16) & 0xFFFFFFFF, **fields)
    if re.fullmatch(r"[+-]?(INF|QNAN|NAN|[\d.]+(e[-+]?\d+)?)", body):
        value = np.float32(body.replace("QNAN", "NAN")).view(np.uint32)
        return Operand("float", int(value), **fields)
    return Operand("name", **fields)


def _terms(inner: str) -> tuple[tuple[str, int, bool, int], ...]:
    terms = []
    for part in re.findall(r"-?[^+\s]+", inner.replace("+-", "+-")):
        if match := re.fullmatch(r"(UR|R)(\d+|Z)(\.64|\.U32)?(?:\.X(\d+))?(\.64)?", part):
            kind, number, wide, factor, also = match.groups()
            index = -1 if number == "Z" else int(number)
            terms.append((kind, index, ".64" in (wide, also), int(factor or 1)))
        else:
            terms.append(("imm", int(part, 16), False, 1))
    return tuple(terms)

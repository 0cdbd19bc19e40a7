"""Runs machine code: warps in step, lanes that part and meet again, blocks with barriers."""

from collections.abc import Callable, Sequence

import numpy as np

from .memory import Costs, Fault, Global, Shared
from .program import STEP, Instruction, Operand, Program

FRAME = 1024
"""Local memory of a thread: what the compiler spills."""

STACK_AT, BLOCK_SIZE_AT, GRID_SIZE_AT = 0x28, 0x0, 0xC
"""Offsets in constant bank 0, the same from sm_80 to sm_90."""

RUNNING, AT_WARPSYNC, AT_BARRIER, AT_BSYNC = 0, 1, 2, 3
"""What a lane waits for; AT_BSYNC + i is convergence barrier i."""

NEVER = 1 << 40
MOST_STEPS = 3_000_000

Handler = Callable[["Machine", Instruction, np.ndarray], None]
HANDLERS: dict[str, Handler] = {}


def executes(*names: str) -> Callable[[Handler], Handler]:
    """Register what carries out the instructions called `names`."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


class Machine:
    """Some blocks of one launch.

    All lanes of all warps that stand at the lowest address run together; each warp is counted on
    its own, as if it ran alone. Arrays are `(warps, 32)`.
    """

    def __init__(
        self,
        program: Program,
        arguments: bytes,
        memory: Global,
        costs: Costs,
        *,
        grid: int,
        block: int,
        shared_bytes: int,
        blocks: Sequence[int],
        unwritten: bool = False,
    ) -> None:
        self.program, self.memory, self.costs = program, memory, costs
        self.warps_per_block = block // 32
        count = len(blocks) * self.warps_per_block
        self.block = np.repeat(np.arange(len(blocks)), self.warps_per_block)
        self.warp = np.tile(np.arange(self.warps_per_block), len(blocks))
        self.number = np.asarray(blocks)[self.block] * self.warps_per_block + self.warp
        self.block_index = np.asarray(blocks, dtype=np.uint32)[self.block][:, None]
        self.thread = (self.warp[:, None] * 32 + np.arange(32)).astype(np.uint32)
        self.shared = Shared(
            len(blocks),
            self.warps_per_block,
            shared_bytes,
            program.shared_base,
            unwritten=unwritten,
        )
        bank = np.zeros(program.arguments_at + len(arguments) + 16, dtype=np.uint8)
        bank[program.arguments_at : program.arguments_at + len(arguments)] = np.frombuffer(
            arguments, dtype=np.uint8
        )
        for at, value in ((STACK_AT, FRAME), (BLOCK_SIZE_AT, block), (GRID_SIZE_AT, grid)):
            bank[at : at + 4] = np.frombuffer(np.uint32(value).tobytes(), dtype=np.uint8)
        self.banks = {0: bank, 2: program.constants}
        self.local = np.zeros((count, 32, FRAME), dtype=np.uint8)
        self.R = np.zeros((256, count, 32), dtype=np.uint32)  # row -1, RZ, is never written
        self.UR = np.zeros((64, count, 1), dtype=np.uint32)
        self.P = np.zeros((8, count, 32), dtype=bool)
        self.UP = np.zeros((8, count, 1), dtype=bool)
        self.P[7] = self.UP[7] = True
        self.pc = np.zeros((count, 32), dtype=np.int64)
        self.exited = np.zeros((count, 32), dtype=bool)
        self.wait = np.zeros((count, 32), dtype=np.int8)
        self.meet = np.zeros((16, count, 32), dtype=bool)
        self.open: list[list] = [[] for _ in range(count)]
        self.groups: list[list] = [[] for _ in range(count)]

    def run(self) -> None:
        """Run to the end of every lane.

        Raises:
            Fault: At the first thing that is wrong, with the instruction.
        """
        steps = 0
        while not self.exited.all():
            ready = ~self.exited & (self.wait == RUNNING)
            if not ready.any():
                self._release()
                continue
            where = np.where(ready, self.pc, NEVER)
            at = int(where.min())
            active = where == at
            others = where[~active]
            limit = int(others.min()) if others.size else NEVER
            steps += self._straight(at, limit, active)
            if steps > MOST_STEPS:
                raise Fault("it does not end")

    def _straight(self, at: int, limit: int, active: np.ndarray) -> int:
        """Run lanes `active` from `at` up to a jump, or to where other lanes wait."""
        count, first = int(active.any(1).sum()), at
        while True:
            instruction = self.program.instructions[at // STEP]
            self.costs[instruction.name] += count
            acting = active
            if instruction.guard is not None:
                acting = active & self.predicate(instruction.guard)
            try:
                control = CONTROL.get(instruction.name)
                if control is not None:
                    self.pc[active] = at + STEP
                    control(self, instruction, active, acting)
                    return (at - first) // STEP + 1
                handler = HANDLERS.get(instruction.name)
                if handler is None:
                    raise Fault("the simulator does not know this instruction")
                if acting.any():
                    handler(self, instruction, acting)
            except Fault as fault:
                raise Fault(f"{self.program.name} {instruction.text}: {fault}") from None
            at += STEP
            if at >= limit:
                self.pc[active] = at
                return (at - first) // STEP

    def _release(self) -> None:
        """Let go on who waits, once all for whom they wait have come."""
        free = np.zeros_like(self.exited)
        for barrier in range(16):
            waiting = self.wait == AT_BSYNC + barrier
            if waiting.any():
                met = (~self.meet[barrier] | self.exited | waiting).all(1, keepdims=True)
                free |= waiting & met
        waiting = self.wait == AT_WARPSYNC
        free |= waiting & (waiting | self.exited).all(1, keepdims=True)
        waiting = self.wait == AT_BARRIER
        if waiting.any():
            here = (waiting | self.exited).all(1)
            for block in np.unique(self.block):
                rows = self.block == block
                if here[rows].all() and waiting[rows].any():
                    free[rows] |= waiting[rows]
                    self.shared.barrier(int(block))
                    self.memory.barrier(
                        int(self.number[self.block == block][0]) // self.warps_per_block
                    )
        if not free.any():
            raise Fault(f"{self.program.name}: deadlock: lanes wait for lanes that never come")
        self.pc[free] += STEP
        self.wait[free] = RUNNING

    def value(self, operand: Operand) -> np.ndarray:
        """32 bits of an operand that is an integer; `-` and `~` are applied."""
        out = self.bits(operand)
        if operand.invert:
            out = ~out
        return np.uint32(0) - out if operand.negate else out

    def bits(self, operand: Operand) -> np.ndarray:
        """32 bits of an operand, without what stands before it."""
        if operand.kind == "R":
            return self.R[operand.index]
        if operand.kind == "UR":
            return self.UR[operand.index]
        if operand.kind in ("imm", "float"):
            return np.full((1, 1), operand.index, dtype=np.uint32)
        if operand.kind == "const":
            return self.constant(operand, 4)
        raise Fault(f"operand {operand.text}")

    def wide(self, operand: Operand) -> np.ndarray:
        """64 bits: a register and the next one, or a constant."""
        if operand.kind == "const":
            return self.constant(operand, 8)
        if operand.kind == "imm":
            return self.bits(operand).astype(np.uint64)
        file = self.R if operand.kind == "R" else self.UR
        if operand.index < 0:
            return np.zeros_like(file[0], dtype=np.uint64)
        return file[operand.index].astype(np.uint64) | file[operand.index + 1].astype(
            np.uint64
        ) << np.uint64(32)

    def constant(self, operand: Operand, size: int) -> np.ndarray:
        bank = self.banks.get(operand.index)
        if bank is None:
            raise Fault(f"constant bank {operand.index}")
        at = self.sum(operand).astype(np.int64)
        if (at + size > bank.size).any():
            at = np.where(at + size > bank.size, 0, at)  # of lanes that are switched off
        rows = bank[at[..., None] + np.arange(size)]
        return np.ascontiguousarray(rows).view(f"u{size}")[..., 0]

    def sum(self, operand: Operand) -> np.ndarray:
        """An address, uint64."""
        total = np.zeros((1, 1), dtype=np.uint64)
        for kind, index, is_wide, factor in operand.terms:
            if kind == "imm":
                total = total + np.uint64(index & (1 << 64) - 1)
            else:
                register = Operand(kind, index)
                part = self.wide(register) if is_wide else self.bits(register).astype(np.uint64)
                total = total + part * np.uint64(factor)
        return total

    def predicate(self, operand: Operand) -> np.ndarray:
        found = (self.P if operand.kind == "P" else self.UP)[operand.index]
        return ~found if operand.invert else found

    def set(self, operand: Operand, value: np.ndarray, acting: np.ndarray) -> None:
        """Write a register of the lanes `acting`, or of their warps."""
        if operand.index < 0:
            return
        value = value.astype(np.uint32, copy=False)
        if operand.kind == "R":
            np.copyto(self.R[operand.index], value, where=acting)
        else:
            self._uniform(self.UR[operand.index], value, acting)

    def set_wide(self, operand: Operand, value: np.ndarray, acting: np.ndarray) -> None:
        if operand.index >= 0:
            high = Operand(operand.kind, operand.index + 1)
            self.set(operand, value & np.uint64(0xFFFFFFFF), acting)
            self.set(high, value >> np.uint64(32), acting)

    def set_predicate(self, operand: Operand, value: np.ndarray, acting: np.ndarray) -> None:
        if operand.index == 7:
            return
        if operand.kind == "P":
            np.copyto(self.P[operand.index], value, where=acting)
        else:
            self._uniform(self.UP[operand.index], value, acting)

    def _uniform(self, target: np.ndarray, value: np.ndarray, acting: np.ndarray) -> None:
        rows = acting.any(1, keepdims=True)
        if value.shape[-1] == 32:  # of a lane that acts
            value = np.take_along_axis(value, acting.argmax(1)[:, None], axis=1)
        np.copyto(target, value, where=rows)

    def whole(self, acting: np.ndarray) -> None:
        """Fault unless all 32 lanes take part in what lanes do together."""
        partial = acting.any(1) & ~acting.all(1)
        if partial.any():
            raise Fault(f"by {int(acting[partial][0].sum())} lanes of a warp")


Control = Callable[[Machine, Instruction, np.ndarray, np.ndarray], None]


def _branch(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    target = i.operands[-1].index
    if i.has("DIV"):
        m.whole(active)
        return
    if i.has("CONV"):
        m.pc[active & active.all(1, keepdims=True)] = target
        return
    for condition in i.operands[:-1]:
        if condition.kind in ("P", "UP"):
            acting = acting & m.predicate(condition)
    m.pc[acting] = target


def _exit(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    m.exited |= acting


def _number(i: Instruction) -> int:
    return int(i.operands[0].text.removeprefix("B"))


def _enter(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    np.copyto(m.meet[_number(i)], active, where=active.any(1, keepdims=True))


def _leave(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    m.meet[_number(i)] &= ~acting


def _wait_at(m: Machine, lanes: np.ndarray, state: int) -> None:
    m.pc[lanes] -= STEP
    m.wait[lanes] = state


def _reconverge(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    _wait_at(m, acting & m.meet[_number(i)], AT_BSYNC + _number(i))


def _warpsync(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    if i.has("COLLECTIVE"):
        raise Fault("the slow path for a warp that has parted")
    _wait_at(m, acting, AT_WARPSYNC)


def _barrier(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    if not i.has("SYNC") or i.operands[0].index != 0 or len(i.operands) > 1:
        raise Fault("only barrier 0 of the whole block is known")
    m.whole(acting)
    _wait_at(m, acting, AT_BARRIER)


def _call(m: Machine, i: Instruction, active: np.ndarray, acting: np.ndarray) -> None:
    """By name the compiler's own code for a warp that has parted; by address a far jump."""
    if i.name == "RET" or i.operands[-1].kind != "imm":
        if acting.any():
            raise Fault("the compiler's slow path for a warp that has parted")
        return
    m.pc[acting] = i.operands[-1].index


CONTROL: dict[str, Control] = {
    "BRA": _branch,
    "EXIT": _exit,
    "BSSY": _enter,
    "BREAK": _leave,
    "BSYNC": _reconverge,
    "WARPSYNC": _warpsync,
    "BAR": _barrier,
    "CALL": _call,
    "RET": _call,
}

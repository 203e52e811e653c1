"""What the machine code of a cubin does to memory: its loads and stores, by the bits that a thread moves.

Reads the listing of NVIDIA's disassembler, which comes with Triton. Knows no kernel.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import SafelightError

# LDGSTS copies from global to shared memory without a register: a load; ATOM and RED are neither
_OPCODES = {"LDG": "load", "LDGSTS": "load", "STG": "store", "LDL": "local", "STL": "local"}
_LINE = re.compile(rf"\b({'|'.join(_OPCODES)})((?:\.[A-Z0-9_]+)*)\s")
_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
WIDE_BITS = 128


@dataclass(frozen=True, slots=True)
class MemoryAccess:
    """How many instructions there are: global loads and stores by bits a thread, and any on local memory."""

    loads: dict[int, int]
    stores: dict[int, int]
    local: int


def read(listing: str) -> MemoryAccess:
    """Count the instructions of a listing in NVIDIA's SASS."""
    found: dict[str, Counter[int]] = {"load": Counter(), "store": Counter(), "local": Counter()}
    for opcode, modifiers in _LINE.findall(listing):
        widths = [_BITS[part] for part in modifiers.split(".") if part in _BITS]
        found[_OPCODES[opcode]][widths[0] if widths else 32] += 1
    return MemoryAccess(dict(found["load"]), dict(found["store"]), found["local"].total())


def disassemble(cubin: Path) -> str:
    """The listing of a cubin. Raises SafelightError where the disassembler does not read it."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "Function :" not in done.stdout:
        said = done.stderr.strip().splitlines()
        raise SafelightError(f"{cubin} cannot be disassembled ({said[-1] if said else 'no function in it'})")
    return done.stdout

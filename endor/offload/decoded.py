"""Units that stay in memory with their entropy code undone.

Codec `raw` takes half again as much memory as `exp`, and one step less for every product. What the
elements are does not change.
"""

from collections.abc import Mapping

import numpy as np

from endor import kernels
from endor.codecs import Encoded
from endor.errors import FormatError
from endor.planning.units import CACHE_LINE, Unit
from endor.storage.layout import align_up


def decode_unit(unit: Unit, bound: Mapping[str, Encoded], memory: np.ndarray) -> dict[str, Encoded]:
    """Return the tensors of a unit, decoded into `memory`, u8 of `unit.decoded_nbytes`.

    Raises:
        FormatError: What is stored is not what its header says.
    """
    out: dict[str, Encoded] = {}
    at = 0
    for name in unit.tensors:
        made = _decoded(bound[name], f"{unit.record.path}: tensor {name}")
        arrays = {}
        for suffix, source in made.arrays.items():
            target = memory[at : at + source.nbytes].view(source.dtype).reshape(source.shape)
            np.copyto(target, source)
            arrays[suffix] = target
            at += align_up(source.nbytes, CACHE_LINE)
        out[name] = Encoded(made.spec, arrays)
    return out


def _decoded(stored: Encoded, where: str) -> Encoded:
    spec = stored.spec.decoded
    if spec is stored.spec:
        return stored
    bits = np.empty(spec.shape, spec.dtype.uint)
    kernels.decode(stored, bits.reshape(-1))
    made = kernels.encode(bits, spec.dtype, codec="raw", bitmap=True)
    if made.spec != spec:
        raise FormatError(
            f"{where}: its header says that {spec.nnz} elements are stored, "
            f"found {made.spec.nnz} that are not zero; run endor verify"
        )
    return made

"""`endor inspect`: what a packed checkpoint holds."""

from pathlib import Path

import click

from endor.cli.common import (
    MODEL,
    change,
    expanded_at_load,
    expanded_line,
    human,
    json_option,
    predictors_line,
    recoded_line,
)
from endor.cli.hub import at_hand, revision_option
from endor.cli.tables import table
from endor.cli.terminal import emit, show


@click.command("inspect")
@click.argument("packed", type=MODEL)
@click.option(
    "--model",
    "asks_model",
    is_flag=True,
    help="Also name what its model needs expanded (takes seconds: imports transformers).",
)
@revision_option
@json_option
def inspect_command(packed: Path, asks_model: bool, revision: str | None, as_json: bool) -> None:
    """Show what PACKED holds, tensor by tensor: shape, codec, density, bits per weight.

    Reads headers only; `endor verify` checks the content.
    """
    from endor.checkpoint import inspect_checkpoint

    packed = at_hand(packed, revision)
    found = inspect_checkpoint(packed)
    expanded = expanded_at_load(packed) if asks_model else None
    if as_json:
        names = None if expanded is None else expanded[0]
        emit(found.to_dict() | {"expanded_at_load": names})
        return
    rows = []
    for row in found.rows:
        spec = row.spec
        codec = spec.codec if spec.bitmap or spec.codec == "dense" else f"{spec.codec}, no bitmap"
        if spec.coding is not None:
            kind = "levels" if spec.coding.levels else "symbols"
            codec = f"int, {spec.coding.symbols} {kind}"
        if spec.fields is not None:
            widths = (
                str(spec.fields.layout.width(n)) for n in range(len(spec.fields.layout.fields))
            )
            codec = f"fields of {' and '.join(widths)} bits"
        if spec.codec == "exp":
            codec = f"exp-{spec.k}" + ("" if spec.bitmap else ", no bitmap")
        if spec.transposed:
            codec += ", neurons in bundles" if spec.bundles else ", by neuron"
        rows.append(
            [
                row.name,
                "x".join(map(str, spec.shape)) or "scalar",
                spec.dtype.name,
                codec,
                f"{spec.density:.4f}",
                f"{spec.bits_per_weight:.3f}",
                human(spec.nbytes),
            ]
        )
    show(table(["tensor", "shape", "dtype", "codec", "density", "bits/weight", "size"], rows))
    sizes = found.sizes
    show("")
    show(
        f"{sizes.tensors} tensors, {sizes.packed_tensors} packed, in {sizes.shards} file(s): "
        f"{human(sizes.dense_bytes)} dense, {human(sizes.packed_bytes)} here, "
        f"{change(sizes.ratio)}"
    )
    if sizes.packed_tensors:
        show(
            f"packed weights: {sizes.weights:,}, density {sizes.density:.4f}, "
            f"{sizes.bits_per_weight:.3f} bits a weight with all metadata and padding"
        )
    if found.neurons is not None and found.neurons.active:
        counts = found.neurons
        texts = ", ".join(map(str, counts.calibration.get("texts", ["calibration text"])))
        show(
            f"neurons: {counts.zeros:.1%} of the activations are zero over {counts.tokens:,} "
            f"tokens of {texts}; {counts.makers(0.8):.0%} of the neurons make 80 % of the others"
        )
    if found.predictors is not None:
        show(predictors_line(found.predictors))
    if found.source is not None:
        show(f"packed from {found.source}")
    recoded_line(sizes, sizes.recoded_tensors)
    if expanded is not None:
        expanded_line(*expanded)

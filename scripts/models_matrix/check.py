"""One model through every door, compared with its dense twin bit for bit."""

import contextlib
import io
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from catalog import GENERATES, Entry
from differences import difference, equal, files_difference, tensors
from examples import Inputs, first_that_runs, image_inputs, text_inputs
from shrink import ATTEMPTS, tiny

import endor
from endor.errors import BudgetError, EndorError
from endor.planning import Placement

Record = dict[str, Any]

NEW_TOKENS = 4
ENTRY_S = 60
"""Time limit of one entry."""

MOST_PARAMETERS = 60_000_000


class Late(BaseException):
    """The entry took too long."""


class Dense(Exception):
    """What the dense side cannot do: no verdict about Endor."""


class Wrong(Exception):
    """Other bits than the dense model's."""


def try_entry(entry: Entry, folder: Path, *, prune: bool = True) -> Record:
    """Return what became of one entry.

    Status is `ok`; `wrong`, other bits; `crash`, an error that is no `EndorError`; `refused`, one
    that is; `dense`, the dense side does not run, with the reason.
    """
    record: Record = {"name": entry.name, "model_type": entry.model_type, "status": "ok"}
    began = time.perf_counter()
    stage = ["build"]
    try:
        _run(entry, folder, record, stage, prune)
    except Dense as error:
        record |= {"status": "dense", "reason": str(error)}
    except Late:
        kind = "dense" if stage[0] in ("build", "dense") else "late"
        record |= {"status": kind, "reason": f"{stage[0]}: takes over {ENTRY_S} s"}
    except Wrong as error:
        record |= {"status": "wrong", "reason": f"{stage[0]}: {error}"}
    except EndorError as error:
        record |= {"status": "refused", "reason": f"{stage[0]}: {_line(error, folder)}"}
    except Exception as error:
        kind = "dense" if stage[0] in ("build", "dense") else "crash"
        record |= {
            "status": kind,
            "reason": f"{stage[0]}: {type(error).__name__}: {_line(error, folder)}",
        }
    record["seconds"] = round(time.perf_counter() - began, 2)
    return record


def _run(entry: Entry, folder: Path, record: Record, stage: list[str], prune: bool) -> None:
    source, packed, back = (folder / name for name in ("dense", "packed", "back"))
    stage[0] = "dense"
    dense, inputs = prepare(entry, source)
    tries = {"text": inputs}
    images = first_that_runs(dense, image_inputs(dense), _forward)
    if not isinstance(images, str):
        tries["image"] = images
    if entry.task == "image-text" or "image" in tries:
        record["image"] = "image" in tries
    wanted = {name: _results(entry, dense, each) for name, each in tries.items()}
    for name, each in tries.items():
        if not equal(_results(entry, dense, each), wanted[name]):
            raise Dense("gives other bits each time")
    stage[0] = "pack"
    report = endor.pack_checkpoint(source, packed, threads=1)
    record["packed_share"] = round(_packed_share(packed), 3)
    record["ratio"] = round(report.sizes.ratio, 3)
    stage[0] = "verify"
    from endor.checkpoint import verify_checkpoint

    found = verify_checkpoint(packed, against=source, threads=1)
    if not found.ok:
        raise Wrong(str(found.problems[0]))
    stage[0] = "unpack"
    endor.unpack_checkpoint(packed, back)
    differs = files_difference(source, back)
    if differs:
        raise Wrong(differs)
    stage[0] = "load"
    model = endor.load_model(packed)
    if type(model).__name__ != entry.class_name:
        raise Wrong(f"loaded as {type(model).__name__}")
    record["loaded_share"] = round(_loaded_share(model, dense), 3)
    _check(entry, model, tries, wanted, stage, "resident")
    del model
    stage[0] = "least budget"
    ram = _least(packed)
    if ram is not None:
        model = endor.load_model(packed, ram=ram)
        if model.endor.units and not model.endor_plan.count(
            "disk"
        ):  # staging alone would hold all of so small a model
            units = {unit.name: unit.nbytes for unit in model.endor.units}
            every = Placement(dict.fromkeys(units, "disk"), 2 * max(units.values()))
            model = endor.load_model(packed, placement=every)
        _check(entry, model, tries, wanted, stage, "streamed")
        del model
    if prune and entry.task in GENERATES:
        stage[0] = "prune"
        record["wanda"] = _wanda(source, folder)


def prepare(entry: Entry, source: Path) -> tuple[Any, Inputs]:
    """Write a tiny random model of an entry; return it as transformers loads it, and inputs.

    Raises:
        Dense: No shrunk config makes one that runs.
    """
    reason = ""
    for dtype in (torch.bfloat16, torch.float32):
        for attempt in range(ATTEMPTS):
            shutil.rmtree(source, ignore_errors=True)
            try:
                build(entry, source, dtype, attempt)
                dense = _load_dense(entry, source)
            except (Dense, ImportError):
                raise
            except Exception as error:
                reason = reason or f"no small model of it: {type(error).__name__}: {_line(error)}"
                continue
            inputs = first_that_runs(dense, text_inputs(dense), _forward)
            if not isinstance(inputs, str):
                return dense, inputs
            tried = f"takes none of the inputs: {inputs}"
            reason = reason or tried
    raise Dense(reason)


def build(entry: Entry, target: Path, dtype: torch.dtype, attempt: int) -> None:
    """Write a tiny random model of an entry, with a tokenizer of its vocabulary.

    Raises:
        Dense: There is no such class here.
        Exception: The shrunk config does not make one.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = getattr(transformers, entry.class_name, None)
    if found is None or not hasattr(found, "config_class"):
        raise Dense("transformers has no such class")
    config_class = found.config_class or CONFIG_MAPPING[entry.model_type]
    torch.manual_seed(0)
    model = found._from_config(tiny(config_class, attempt=attempt), dtype=dtype).eval()
    size = sum(each.numel() for each in model.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the shrunk model has {size} parameters")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(parameter.dtype))
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)


def tokenizer() -> Any:
    """Return a tokenizer of single bytes, of a kind that every model's own class takes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: at for at, symbol in enumerate(["<s>", "</s>", "<u>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )


def _load_dense(entry: Entry, source: Path) -> Any:
    import transformers

    model = getattr(transformers, entry.class_name).from_pretrained(source, dtype="auto").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for name, buffer in model.named_buffers():
        if buffer.data_ptr() % 64:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.clone())
    return model


def _forward(model: Any, inputs: Inputs) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        return model(**inputs)


def _results(entry: Entry, model: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Return every tensor that a forward gives, and greedy tokens where it generates."""
    out = dict(tensors("", _forward(model, inputs)))
    if entry.task in GENERATES and model.can_generate():
        try:
            torch.manual_seed(7)
            kept = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
            with torch.no_grad():
                out["tokens"] = model.generate(**kept, max_new_tokens=NEW_TOKENS, do_sample=False)
        except EndorError:
            raise
        except Exception as error:
            out["no tokens"] = torch.tensor(list(f"{type(error).__name__}".encode()))
    return out


def _check(
    entry: Entry,
    model: Any,
    tries: Mapping[str, Inputs],
    wanted: Mapping[str, Mapping[str, torch.Tensor]],
    stage: list[str],
    how: str,
) -> None:
    for name, inputs in tries.items():
        stage[0] = f"{how}, {name}"
        found = difference(_results(entry, model, inputs), wanted[name])
        if found:
            raise Wrong(found)


def _packed_share(packed: Path) -> float:
    """Return which part of the dense bytes is stored in packed tensors."""
    from endor.checkpoint.loadable import open_layouts

    layouts = open_layouts(sorted(packed.glob("endor-*.safetensors")))
    specs = [entry.spec for layout in layouts for entry in layout.tensors.values()]
    total = sum(spec.dense_nbytes for spec in specs)
    return sum(spec.dense_nbytes for spec in specs if spec.codec != "dense") / max(1, total)


def _loaded_share(model: Any, dense: Any) -> float:
    """Return which part of the dense model's bytes stays packed once it is loaded."""
    tensors = {id(each): each for each in (*dense.parameters(), *dense.buffers())}
    total = sum(each.numel() * each.element_size() for each in tensors.values())
    kept = sum(weight.numel * weight.dtype.itemsize for weight in model.endor.weights.values())
    return float(kept / max(1, total))


def _least(packed: Path) -> int | None:
    """Return the least budget, by what the refusal of less says; None when nothing needs any."""
    try:
        endor.load_model(packed, ram=1)
    except BudgetError as error:
        found = re.search(r"\((\d+) bytes\)", str(error))
        if found is None:
            raise
        return int(found[1])
    return None


def _wanda(source: Path, folder: Path) -> str:
    """Return `ok`, or why calibrated pruning does not run: `refused: ...` or `crash: ...`."""
    from click.testing import CliRunner

    from endor.cli.pack import pack_command

    text = folder / "text.txt"
    text.write_text(
        "It is a truth universally acknowledged, that a tiny model wants some text. " * 9
    )
    words = ["--prune", "wanda", "--samples", "4", "--seq-len", "8", "--calibration", str(text)]
    out = folder / "pruned"
    with contextlib.redirect_stderr(io.StringIO()):
        result = CliRunner().invoke(
            pack_command, [str(source), str(out), *words, "--device", "cpu", "--threads", "1"]
        )
    error = result.exception
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "ok"
    if out.exists():
        return "crash: left its output behind"
    kind = "refused" if isinstance(error, EndorError) else f"crash: {type(error).__name__}"
    return f"{kind}: {_line(error, folder)}"


def _line(error: BaseException, folder: Path | None = None) -> str:
    text = " ".join(str(error).split())
    if folder is not None:
        text = text.replace(f"{folder}/", "")
    return text[:300]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="endor-matrix-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

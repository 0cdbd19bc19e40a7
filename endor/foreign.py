"""Files and directories that people take for a checkpoint: what they are, and what to do."""

from pathlib import Path

LFS_PREFIX = b"version https://git-lfs.github.com/spec/"

_TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PYTORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def describe_file(path: Path) -> str | None:
    """Return what the file at `path` is and what to do, as the end of a message.

    None where nothing is known about it: it may be a damaged safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    if start.startswith(LFS_PREFIX):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    if start.startswith(b"GGUF"):
        return (
            "is a GGUF file, laid out for llama.cpp; `endor pack FILE.gguf OUT` packs it as it is; "
            "to run it, give the Hugging Face checkpoint that it was made from, or convert it with "
            "transformers: "
            "from_pretrained(DIRECTORY, gguf_file=NAME).save_pretrained(OUT)"
        )
    if start.startswith(_TORCH_STARTS) and path.suffix.lower() in (_PYTORCH_SUFFIXES | {".pkl"}):
        return (
            "is a PyTorch file; give the directory that holds it, named pytorch_model.bin, and "
            "config.json"
        )
    if path.suffix == ".json" and start.lstrip()[:1] == b"{":
        return "is a JSON file; give the directory that holds it"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file itself; fetch it again"
    return None


def describe_directory(path: Path) -> str | None:
    """Return what the directory at `path` is and what to do; None where nothing is known."""
    if (path / "snapshots").is_dir():
        return f"is a model's folder in the Hub cache; give the snapshot in it: {snapshot(path)}"
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        return None
    cached = [name for name in names if name.startswith("models--")]
    if cached:
        return (
            f"is the Hub cache of {len(cached)} models; give the snapshot of one: "
            f"{snapshot(path / cached[0])}"
        )
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        described = describe_file(path / gguf[0])
        return f"holds {gguf[0]}, which {described}" if described else None
    if "adapter_config.json" in names or any(name.startswith("adapter_model.") for name in names):
        return (
            "holds a LoRA adapter, not a model; merge it first: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(OUT)"
        )
    if "model_index.json" in names:
        return (
            "is a diffusers pipeline; `endor pack` takes it whole or with --prune magnitude, what "
            "else is to be done takes the folder of one of its models"
        )
    consolidated = [name for name in names if name.startswith("consolidated.")]
    if consolidated and not any(name.endswith(".safetensors") for name in names):
        return (
            f"holds {consolidated[0]}, the layout of the model's authors; give the Hugging Face "
            "checkpoint, or convert it with the script of transformers"
        )
    return None


def snapshot(path: Path) -> Path:
    """Return the snapshot of a model's cache folder that `main` means, or the first."""
    try:
        revision = (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        revision = ""
    if revision and (path / "snapshots" / revision).is_dir():
        return path / "snapshots" / revision
    try:
        return min((path / "snapshots").iterdir(), default=path / "snapshots" / "REVISION")
    except OSError:
        return path / "snapshots" / "REVISION"

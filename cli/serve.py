"""`endor serve`: one model behind OpenAI's HTTP interface."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from endor.cli.common import MODEL, loading_options
from endor.cli.hub import at_hand, revision_option
from endor.cli.terminal import say, show
from endor.cli.types import Size

if TYPE_CHECKING:
    from endor.planning.beside import HostCompute
    from endor.planning.kv import KVSetting
    from endor.planning.workload import Experts


@click.command("serve")
@click.argument("packed", type=MODEL)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port; 0 takes a free one, and says which.",
)
@click.option(
    "--api-key",
    envvar="ENDOR_API_KEY",
    help="What clients must send. Better in the environment as ENDOR_API_KEY: a command line can "
    "be read by others.",
)
@click.option("--name", help="What clients call the model.  [default: the folder's name]")
@click.option(
    "--device", default="cpu", show_default=True, help="Where the model runs, such as cpu or cuda."
)
@loading_options("vram", "ram", "exact", "host_compute", "experts", "predict", "kv", "context")
@click.option(
    "--batch",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Answers made at once. A weight is read and expanded once for all of them; each takes "
    "memory for keys and values.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Most tokens of one answer, and how many are made where a request says nothing.",
)
@click.option(
    "--max-request", type=Size(), default="1MiB", show_default=True, help="Most bytes of a request."
)
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Requests at once; more are told to come back (429).",
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds for open answers once the server shall stop.",
)
@revision_option
def serve_command(
    packed: Path,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    device: str,
    vram: str | None,
    ram: str | None,
    exact: bool,
    host_compute: "HostCompute",
    experts: "Experts",
    predict: bool,
    kv: "KVSetting",
    context: int,
    trust_remote_code: bool,
    batch: int,
    max_new_tokens: int,
    max_request: int,
    max_waiting: int,
    grace: int,
    revision: str | None,
) -> None:
    """Serve the checkpoint PACKED to OpenAI's clients.

    Routes: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health and /metrics
    (Prometheus). Requests are answered one after the other, or --batch of them at once; Ctrl-C or
    SIGTERM finishes open answers and stops. PACKED may also be an ordinary checkpoint; memory
    options and --batch then do not apply.
    """
    from endor.checkpoint.loadable import is_packed
    from endor.errors import ConfigError
    from endor.hf.load import open_model
    from endor.serving.limits import Limits
    from endor.serving.server import check_installed, serve, served_name
    from endor.trust import read_tokenizer

    check_installed()
    if max_new_tokens >= context:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens} leaves no prompt of --context {context}; "
            "raise --context"
        )
    if batch > 1:
        if kv in ("ram", "disk"):
            raise ConfigError(
                f"--batch {batch} keeps keys and values where the model computes, not in "
                f"--kv {kv}; leave out one of them"
            )
        kv = "device"
    limits = Limits(max_new_tokens, max_request, max_waiting, context)
    given, packed = packed, at_hand(packed, revision)
    if batch > 1 and not is_packed(packed):
        raise ConfigError(
            f"{packed} is an ordinary checkpoint: --batch shares the expansion of packed weights"
        )
    tokenizer = read_tokenizer(packed, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{packed}: serving needs a fast tokenizer (tokenizer.json)")
    model = open_model(
        packed,
        device=device,
        vram=vram,
        ram=ram,
        exact=exact,
        host_compute=host_compute,
        experts=experts,
        predict=predict,
        context=context,
        batch=batch,
        kv=kv,
        trust_remote_code=trust_remote_code,
    )
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: anybody who reaches {host} may use this server; give --api-key")
    called = name or served_name(given)

    def ready(address: str) -> None:
        show(f"{called} at {address}/v1")
        if experts == "lossy":
            show("experts: lossy; answers are not the model's own")
        if predict:
            show("predict: lossy; answers are not the model's own")

    serve(
        model,
        tokenizer,
        called,
        host=host,
        port=port,
        api_key=api_key,
        limits=limits,
        batch=batch,
        grace_s=grace,
        ready=ready,
    )

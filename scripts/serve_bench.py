"""Tokens/s of `endor serve` by clients at once: one answer after the other, and in a batch.

python scripts/serve_bench.py PACKED --ram 80MiB --clients 4 --batch 4
python scripts/serve_bench.py PACKED --ram 80MiB --clients 4 --batch 1 --fast
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens/s of endor serve by clients at once.")
    parser.add_argument("packed", type=Path)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "endor", "serve", str(options.packed), "--port", "0"]
    command += ["--name", "model", "--ram", options.ram, "--batch", str(options.batch)]
    command += ["--context", str(CONTEXT), "--max-new-tokens", "40"]
    command += ["--fast"] if options.fast else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        _, _, address = server.stdout.readline().partition(" at ")
        if not address:
            sys.exit("the server did not start")

        def ask(number: int, tokens: int) -> int:
            client = openai.OpenAI(base_url=address.strip(), api_key="none", timeout=600)
            with client:
                made = client.completions.create(
                    model="model", prompt=f"Number {number} is", max_tokens=tokens, temperature=0
                )
            assert made.usage is not None
            return made.usage.completion_tokens

        ask(0, 4)
        start = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            made = sum(pool.map(ask, range(options.clients), [options.tokens] * options.clients))
        rate = made / (time.perf_counter() - start)
        what = "--fast" if options.fast else "--exact"
        print(
            f"{options.clients} clients, --batch {options.batch}, --ram {options.ram}, {what}: "
            f"{rate:.1f} tokens/s"
        )
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()

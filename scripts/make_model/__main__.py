"""Write a checkpoint to measure with, as an ordinary Hugging Face directory.

    python scripts/make_model smollm2 OUT      SmolLM2-135M-Instruct, without a model hub
    python scripts/make_model random OUT       Llama-2-7B's layers, ten of them, random weights
    python scripts/make_model relu OUT         OPT-6.7B's layers, four of them, most neurons at 0
    python scripts/make_model moe DENSE OUT    a mixture of experts made of a small dense model
    python scripts/make_model opt OUT          a small OPT, trained for four minutes

Each takes options of its own: `python scripts/make_model random --help`.
"""

import argparse
from importlib import import_module

KINDS = {
    "smollm2": "smollm2",
    "random": "random_llama",
    "relu": "relu_opt",
    "moe": "mixture",
    "opt": "small_opt",
}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="depends on the kind")
    chosen = parser.parse_args()
    kind = import_module(KINDS[chosen.kind])  # only this one, and the libraries that it needs
    own = argparse.ArgumentParser(
        prog=f"make_model {chosen.kind}", description=kind.__doc__, formatter_class=style
    )
    kind.add_options(own)
    kind.run(own.parse_args(chosen.rest))


if __name__ == "__main__":
    main()

"""The options of loading: one table, the same behind every door."""

import inspect
import re
from pathlib import Path

import pytest

import endor
from endor.cli.generate import generate_command
from endor.cli.plan import plan_command
from endor.errors import ConfigError
from endor.hf import EndorConfig, Loading
from endor.hf.config import DEFAULTS, OPTIONS, settled, workload
from endor.hf.load import open_model
from endor.hf.planned import plan_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_table_is_complete():
    assert set(Loading.__annotations__) == set(OPTIONS)
    documented = re.findall(r"^    (\w+): ", inspect.cleandoc(Loading.__doc__), re.MULTILINE)
    assert sorted(documented) == sorted(OPTIONS)
    rows = re.findall(
        r"^\| (`[^|]+`) \|", PAGE.read_text().split("## EndorConfig")[1], re.MULTILINE
    )
    assert set(OPTIONS) <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    "door", [endor.load_model, open_model, plan_checkpoint, EndorConfig.__init__]
)
def test_every_door_shows_the_options(door):
    shown = inspect.signature(door).parameters
    assert {name: shown[name].default for name in OPTIONS} == DEFAULTS
    assert not any(item.kind is item.VAR_KEYWORD for item in shown.values())


@pytest.mark.parametrize("command", [generate_command, plan_command], ids=["generate", "plan"])
def test_commands_have_the_same_defaults(command):
    shown = command.make_context("", ["--prompt", "1", "."]).params
    common = set(OPTIONS) & set(shown) - {"prompt", "measure"}
    assert common >= {"ram", "vram", "exact", "kv"}
    assert {name: shown[name] for name in common} == {name: DEFAULTS[name] for name in common}


def test_an_option_that_does_not_exist(tmp_path):
    for call in (settled, lambda options: EndorConfig(**options)):
        with pytest.raises(ConfigError, match="rma: is no option of loading; there are batch"):
            call({"rma": "1GiB"})
    with pytest.raises(ConfigError, match="rma"):
        endor.load_model(tmp_path, rma="1GiB")


def test_sizes_become_bytes_and_attributes_are_settled_again():
    config = EndorConfig(ram="1GiB", vram=5)
    assert (config.ram, config.vram) == (1 << 30, 5)
    config.ram = "2GiB"
    config.check()
    assert config.ram == 2 << 30
    config.kv = "tape"
    with pytest.raises(ConfigError, match="kv"):
        config.check()


def test_a_prompt_longer_than_the_context_is_cut():
    found = workload({"context": 64, "exact": False})
    assert (found.prompt, found.context, found.product) == (64, 64, "direct")

"""Values of options: what a shell hands over, read and checked."""

from typing import Any

import click


class Text(click.ParamType[str]):
    """Text; the shell may hand over bytes that are none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) & 0xFF
            self.fail(f"must be UTF-8; byte {byte:#04x} after {error.start} characters is not")
        return str(value)


class Share(click.FloatRange):
    """A share from 0 to below 1; says what a percentage should have been."""

    name = "float range"

    def __init__(self) -> None:
        super().__init__(0, 1, max_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = -1.0
        if 1 <= number < 100 or (text.endswith("%") and 0 <= number < 100):
            self.fail(f"must be a share from 0 to below 1; for {number:g} % give {number / 100:g}")
        return float(super().convert(value, param, ctx))


class Size(click.ParamType[int]):
    """A number of bytes: `4GiB`, `500MB`, `1048576`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from endor.errors import ConfigError
        from endor.sizes import parse_bytes

        try:
            return parse_bytes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)

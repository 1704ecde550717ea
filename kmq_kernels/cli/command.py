"""A command of `kmq`: its help page in groups, and what it was asked for when something goes wrong."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from .layout import bold, entry, paragraphs, width
from .options import DATA, MEASUREMENT, MODEL, OUTPUT, QUANTIZATION, TRAINING

GROUPS = (MODEL, DATA, QUANTIZATION, TRAINING, MEASUREMENT, OUTPUT, "Help")

# Arguments of Python and the options that stand for them, where the names differ by more than hyphens.
_OPTIONS = {
    "name": "task",
    "text_columns": "text_column",
    "ignore_labels": "ignore_label",
    "shard_bytes": "shard_size",
}


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    short = [name for name in parameter.opts if not name.startswith("--")]
    long = [name for name in parameter.opts if name.startswith("--")]
    names = ", ".join([*short, *long]) + "".join(f" / {name}" for name in parameter.secondary_opts)
    return names if parameter.is_flag or not parameter.metavar else f"{names} {parameter.metavar}"


def _sentence(parameter: Any) -> str:
    text = parameter.help or ""
    default = parameter.default
    if isinstance(parameter.show_default, str):
        return f"{text} [default: {parameter.show_default}]"
    if parameter.required:
        return f"{text} [required]"
    if parameter.name in ("help", "version"):
        return text
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{text} [default: {'none' if default is None else getattr(default, 'value', default)}]"


class Command(TyperCommand):
    """A command with its options in groups."""

    current: Command | None = None  # the one that was asked for
    values: dict[str, Any] = {}  # noqa: RUF012  # its parameters, as far as they were understood
    sources: dict[str, str] = {}  # noqa: RUF012  # where each came from, as typer calls it

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Notes the command before its options are read."""
        Command.current, Command.values = self, {}
        return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Notes the parameters."""
        Command.values = dict(ctx.params)
        Command.sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in ctx.params}
        return super().invoke(ctx)

    @classmethod
    def given(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Those of the options of the running command that the caller gave: a preset may set the others."""
        return {name: value for name, value in values.items() if cls.sources[name] not in ("DEFAULT", "DEFAULT_MAP")}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what it does, and every option with its sentence, default and choices, by group."""
        columns = width()
        parameters = [parameter for parameter in self.get_params(ctx) if not getattr(parameter, "hidden", False)]
        arguments = [p for p in parameters if p.param_type_name == "argument"]
        usage = " ".join(_names(p) if p.required else f"[{_names(p)}]" for p in arguments)
        lines = [f"{bold('Usage:')} {ctx.command_path} {usage} [OPTIONS]", "", *paragraphs(self.help or "", columns, "  ")]
        groups: dict[str, list[Any]] = {}
        for parameter in parameters:
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Help", []).append(parameter)
        for group in sorted(groups, key=GROUPS.index):
            lines += ["", bold(group)]
            for parameter in groups[group]:
                lines += entry(_names(parameter), _sentence(parameter), columns)
        formatter.write("\n".join(lines) + "\n")

    def in_words_of_the_caller(self, sentence: str) -> str:
        """A sentence that begins with the name of an argument of Python begins with that of its option, if there is one."""
        found = re.match(r"(\w+)(?=: )", sentence)
        name = found[1] if found else ""
        for parameter in self.params:
            if parameter.name == _OPTIONS.get(name, name):
                option = _names(parameter) if parameter.param_type_name == "argument" else _long(parameter)
                return option + sentence[len(name) :]
        return sentence


def _long(parameter: Any) -> str:
    return next(name for name in parameter.opts if name.startswith("--"))


class Group(TyperGroup):
    """The commands with a sentence each."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage and the commands."""
        columns = width()
        lines = [f"{bold('Usage:')} {ctx.command_path} COMMAND [OPTIONS]", "", *paragraphs(self.help or "", columns, "  ")]
        lines += ["", bold("Commands")]
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            lines += entry(name, (getattr(command, "help", None) or "").strip().partition("\n")[0], columns)
        lines += ["", bold("Options")]
        for parameter in self.get_params(ctx):
            lines += entry(_names(parameter), _sentence(parameter), columns)
        formatter.write("\n".join(lines) + "\n")
